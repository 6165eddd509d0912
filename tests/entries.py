"""Runs of every kind, small enough for tests: their entries in params, and networks of random weights."""

import torch

from equilab.core.config import parse, plain
from equilab.models.checkpoint import save_tensors
from equilab.sampling.generators import KINDS
from equilab.training import trainer

IMAGE, CLASSES = (1, 8, 8), 10
OPTIMISATION = dict(
    nimg=64,
    batch=8,
    micro_batch=8,
    lr=1e-3,
    betas=[0.9, 0.999],
    weight_decay=0.0,
    clip=1.0,
    warmup_nimg=0,
    decay="none",
    decay_start_nimg=0,
    ema_half_life_nimg=64.0,
    ema_warmup=0.0,
    precision="fp32",
    compile=False,
    report_nimg=8,
    snapshots=[8],
)
UNET = dict(
    kind="unet",
    architecture="ddpmpp",
    width=8,
    multipliers=[1, 2],
    blocks=1,
    attention=[4],
    head_channels=0,
    dropout=0.0,
    augment=0,
)
TRANSFORMER = dict(width=16, heads=2, patch=2, expansion=2)
TEACHER = dict(
    network=UNET, conditional=True, sigma_data=0.75, sigma_mean=-1.2, sigma_std=1.2, optimisation=OPTIMISATION
)
GET = dict(
    network=dict(
        kind="get", depth=1, equilibrium_depth=2, equilibrium_expansion=2, normalise=True, **TRANSFORMER
    ),
    conditional=True,
    equilibrium=dict(init="zeros", iterations=3, gradient="unrolled", correction=None),
    pairs=40,
    loss="l1",
    seed=0,
    optimisation=OPTIMISATION,
)
VIT = {
    **GET,
    "network": dict(kind="vit", depth=2, conditioning="additive", **TRANSFORMER),
    "equilibrium": None,
}
FPDM = dict(
    network=dict(kind="fpdm", pre=1, post=1, learned_variance=True, pre_post_timestep=False, **TRANSFORMER),
    conditional=True,
    label_dropout=0.1,
    diffusion=dict(
        timesteps=100,
        beta_start=1e-3,
        beta_end=0.1,
        zero_terminal_snr=True,
        prediction="v",
        variance="learned",
    ),
    weight="uniform",
    fixed_point=dict(gradient="s_jfb", no_grad_iterations=3, grad_iterations=2),
    seed=0,
    optimisation=OPTIMISATION,
)
DIT = {
    **FPDM,
    "network": dict(kind="dit", depth=3, learned_variance=True, **TRANSFORMER),
    "fixed_point": None,
}
CD = dict(
    network=UNET,
    conditional=True,
    student=dict(start="teacher", freeze="gdd", sigma_min=0.002, sigmas=[80.0, 10.0]),
    levels=dict(steps=4, sigma_min=0.002, sigma_max=80.0, rho=7.0),
    metric="squared",
    form="text",
    seed=0,
    optimisation=OPTIMISATION,
)
PD = dict(
    network=UNET,
    conditional=True,
    teacher="teacher",
    levels=dict(steps=3, sigma_min=0.002, sigma_max=80.0, rho=7.0),
    weight="truncated_snr",
    seed=0,
    optimisation=OPTIMISATION,
)
ENTRIES = {
    "teacher": TEACHER,
    "distill/get": GET,
    "distill/vit": VIT,
    "diffusion/fpdm": FPDM,
    "diffusion/dit": DIT,
    "consistency/cd": CD,
    "progressive/pd": PD,
}

HEUN = dict(method="heun", steps=3, sigma_min=0.002, sigma_max=80.0, rho=7.0)
ITERATE = dict(
    method="iterate", iterations=5, tolerance=0.0, pick="last", memory=None, mixing=None, init="zeros"
)
ALONG = dict(
    blocks=20, budget="constant", reuse=True, method="iterate", tolerance=0.0, memory=None, mixing=None
)
CHAIN = dict(method="ddim", steps=4, eta=0.0, clamp=True, guidance=None, fixed_point=ALONG)
SETTINGS = {"teacher": {"sampler": [HEUN]}, "distill/get": {"solver": [{**ITERATE, "iterations": 2}]}}
SETTINGS |= {
    "diffusion/fpdm": {"chain": [CHAIN]},
    "diffusion/dit": {"chain": [{**CHAIN, "fixed_point": None}]},
}
# the params section `evaluate`
EVALUATE = {of.replace("/", "-"): {"of": of, **SETTINGS.get(of, {})} for of in ENTRIES}


def parsed(of):
    """Return the config of a run."""
    stage = of.partition("/")[0]
    return parse(KINDS[stage].training.Config, ENTRIES[of], of)


def drawn(config):
    """Return the network of a run, of which weights that start at zero are drawn too, so that all inputs matter."""
    net = trainer.build(config.network, 0, "weights", IMAGE, CLASSES)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return net.eval()


def write_untrained(folder):
    """Write the weights of all runs, which were drawn, as results of a study in a folder."""
    for of in ENTRIES:
        stage, _, name = of.partition("/")
        config = parsed(of)
        net = drawn(config)
        about = {"image": IMAGE, "classes": CLASSES, "sigma_data": 0.75, "nimg": 64, "parameters": 1}
        about |= {"stage": stage, "run": name, "family": config.family.name, "config": plain(config)}
        place = folder / "results" / stage
        place = place / name / "0" if name else place
        save_tensors(place / "weights.safetensors", net.state_dict(), about)
        save_tensors(place / "snapshots/0000000008.safetensors", net.state_dict(), {**about, "nimg": 8})
