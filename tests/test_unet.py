"""The U-Nets of EDM and their preconditioning against the published ones, and by themselves."""

import math

import pytest
import torch
from conftest import close, golden, weights_of
from reference import UNETS, hashed_unet, stored_denoiser

from equilab import published
from equilab.core.config import UserError, spec
from equilab.metrics.counting import parameters
from equilab.models.precond import EDM, coefficients
from equilab.models.unet import UNet

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")

TINY = {
    "width": 16,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (4,),
    "head_channels": 0,
    "dropout": 0.1,
    "augment": 0,
}


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
@torch.no_grad()
def test_networks_agree_with_the_published_ones(name):
    values, model, label = stored_denoiser(name)
    x, noise_label = values["in.x"], values["in.noise_labels"]
    close(model.net.map_noise(noise_label), values["out.noise_embedding_before_swap"], 1e-5)
    close(model.net(x, noise_label, label), values["out.raw"], 1e-5)
    if "in.augment_labels" in values:
        out = model.net(x, noise_label, label, values["in.augment_labels"])
        close(out, values["out.raw_with_augment_labels"], 1e-5)
    if label is not None:
        close(model.net(x, noise_label, None), values["out.raw_zero_labels"], 1e-5)


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
@torch.no_grad()
def test_denoisers_agree_with_the_published_ones_for_one_sigma_and_for_one_each(name):
    values, model, label = stored_denoiser(name)
    for sigma, reference in zip(values["in.sigmas"], values["out.denoised"], strict=True):
        x = values["in.x"] * sigma.clamp(min=0.5)
        close(model(x, sigma, label).image, reference, 1e-5)
        close(model(x, sigma.item(), label).image, reference, 1e-5)
    denoised = model(values["in.x"], values["in.sigma_per_sample"], label)
    close(denoised.image, values["out.denoised_per_sample"], 1e-5)
    assert denoised.carry is None and denoised.solution is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "architecture", "condition"),
    [("cifar10", "ddpmpp", "cond"), ("cifar10", "ncsnpp", "uncond"), ("imagenet", "adm", "cond")],
)
@torch.no_grad()
def test_full_size_networks_agree_with_the_published_ones(data, architecture, condition):
    name = {"cifar10": "cifar10", "imagenet": "imagenet64"}[data]
    values, metadata = golden(f"full_{name}_{architecture}_{condition}")
    config = metadata["config"]
    side, classes, augment = (config[key] for key in ("img_resolution", "label_dim", "augment_dim"))
    with torch.device("meta"):
        sizes = UNETS[data] | {"dropout": 0.0, "augment": augment}
        net = UNet((3, side, side), classes, architecture=architecture, **sizes)
    model = hashed_unet("edm", net)
    assert parameters(model) == int(metadata["parameters"])
    label = values["in.class_labels"].argmax(1) if classes else None
    close(model(values["in.x"], values["in.sigma"], label).image, values["out.denoised"], 1e-5)


def published_network(name):
    """Return the network of an entry of the facts, such as "cifar10_32_ddpmpp_cond_augment_dim9", without weights."""
    data = name.partition("_")[0]
    architecture = next(architecture for architecture in ARCHITECTURES if architecture in name)
    side, classes = {"cifar10": (32, 10), "ffhq": (64, 0), "imagenet": (64, 1000)}[data]
    sizes = UNETS[data] | {"dropout": 0.0, "augment": 9 if name.endswith("dim9") else 0}
    with torch.device("meta"):
        return UNet((3, side, side), classes if "_cond" in name else 0, architecture=architecture, **sizes)


@pytest.mark.slow
def test_networks_have_the_published_numbers_of_parameters_buffers_and_tensors(facts):
    for name, counts in facts["edm_parameters"].items():
        net = published_network(name)
        assert parameters(net) == counts["parameters"], name
        assert sum(buffer.numel() for buffer in net.buffers()) == counts["buffers"], name
        assert len(net.state_dict()) == counts["state_dict_tensors"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("height", "multipliers"), [(8, (1, 1)), (8, (1, 2)), (28, (1, 2, 2)), (6, (2,))])
def test_any_size_that_halves_works_and_every_parameter_gets_a_gradient(architecture, height, multipliers):
    sizes = {**TINY, "multipliers": multipliers, "attention": [height]}
    net = UNet((1, height, height), 10, architecture=architecture, **sizes)
    x = torch.randn(2, 1, height, height)
    out = net(x, torch.tensor([-1.0, 0.5]), torch.tensor([3, 7]))
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_network_returns_almost_nothing_so_that_training_starts_at_the_skip_connection(architecture):
    net = UNet((3, 8, 8), 0, architecture=architecture, **TINY)
    assert net(torch.randn(2, 3, 8, 8), torch.zeros(2), None).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_channels_last_gives_the_same_image_in_channels_last(architecture):
    values, model, label = stored_denoiser(f"edm_{architecture}")
    model = model.to(memory_format=torch.channels_last)
    out = model.net(values["in.x"].to(memory_format=torch.channels_last), values["in.noise_labels"], label)
    assert out.is_contiguous(memory_format=torch.channels_last)
    close(out, values["out.raw"], 1e-5)


@torch.no_grad()
def test_autocast_reaches_the_network_but_not_the_preconditioning():
    values, model, label = stored_denoiser("edm_ncsnpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.net(values["in.x"], values["in.noise_labels"], label).dtype == torch.bfloat16
        denoised = model(values["in.x"].double(), 0.5, label).image
    assert denoised.dtype == torch.float32
    close(denoised, model(values["in.x"], 0.5, label).image, 0.03)


def test_preconditioning_gives_network_inputs_and_targets_unit_variance():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = coefficients(sigma, 0.5)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2, c_out**2)
    assert c_noise[2].item() == pytest.approx(math.log(80) / 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"multipliers": (1, 2, 2, 2, 2)}, " 4 .* 16"),
        ({"width": 36}, "144 channels"),
        ({"width": 2}, "2 channels"),
        ({"attention": (16,)}, r"attention=\[16\].*\[8, 4\]"),
        ({"head_channels": 7}, "head_channels=7.*32"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        UNet((1, 8, 8), 0, **{"architecture": "ddpmpp"} | TINY | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "ddpm"}, "architecture: 'ddpm'.*ddpmpp"),
        ({"multipliers": []}, "multipliers"),
        ({"width": 0}, "width"),
        ({"blocks": 0}, "blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"head_channels": -1}, "head_channels"),
    ],
)
def test_sizes_of_params_out_of_their_range_are_refused_by_their_key(change, named):
    given = {"kind": "unet", "architecture": "ddpmpp", **TINY, **change}
    with pytest.raises(UserError, match=rf"network\.{named}"):
        spec({"unet": UNet}, given, "network")


def test_an_image_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"image=\(1, 8, 16\)"):
        UNet((1, 8, 16), 0, architecture="adm", **TINY)


def test_labels_that_the_network_was_not_built_for_are_refused():
    model = EDM(UNet((1, 8, 8), 0, architecture="adm", **TINY), sigma_data=0.5)
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="classes=0"):
        model(x, 1.0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="augment=0"):
        model(x, 1.0, None, augment_label=torch.zeros(2, 9))


@pytest.mark.parametrize("missing", ["enc.8x8_conv.weight", "map_layer0.weight", "dec.4x4_in0.qkv.bias"])
def test_published_weights_with_a_missing_tensor_are_refused_by_its_name(missing):
    weights = weights_of(golden("edm_ddpmpp")[0])
    del weights[f"model.{missing}"]
    with pytest.raises(UserError, match=f"'{missing}' is missing"):
        published.load("edm", weights)


def test_weights_of_something_else_are_refused():
    with pytest.raises(UserError, match="'enc.'"):
        published.load("edm", {"blocks.0.weight": torch.zeros(2, 2)})
