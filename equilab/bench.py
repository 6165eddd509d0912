"""`make bench`: how fast the models run on this machine, beside the machine's own limit; writes results/bench/."""

from __future__ import annotations

import argparse
import functools
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from equilab.bench_stages import (
    READING,
    ROOT,
    columns_of,
    commands,
    goal_of,
    in_turns,
    memory,
    parts,
    students,
)
from equilab.core import config, rng  # noqa: F401; __main__ before torch: sets how threads wait, as for the stages
from equilab.core.files import write
from equilab.core.machine import precision
from equilab.core.progress import bar
from equilab.data.pairs import Sampler
from equilab.diffusion import discrete_samplers as walk
from equilab.diffusion.discrete import Diffusion, evenly
from equilab.diffusion.samplers import finish
from equilab.metrics.counting import flops, matmul_peak, peak_memory, timed
from equilab.models import dit, fpdm, get, unet, vit
from equilab.models.precond import EDM
from equilab.solvers import Solver
from equilab.stages.evaluate import write_table
from equilab.training import diffusion
from equilab.training.distill import Config, Equilibrium, loss_of
from equilab.training.loop import Optimisation

SECONDS = 4  # that the timed calls of a row take together, about
SLOW = 10  # times slower than fp32 is emulated, and not measured
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
SWITCHED = {"cpu": "fp32", "cuda": "bf16"}  # the precision in which switches are compared

IMAGE, DIGIT, LATENT = (3, 32, 32), (1, 8, 8), (4, 32, 32)
SMALL = dict(width=64, depth=1, heads=4, patch=2, expansion=4, equilibrium_depth=1, equilibrium_expansion=6)
DDPMPP = dict(
    architecture="ddpmpp", width=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), head_channels=0
)
NETWORKS = {  # class, image, classes, sizes
    "GET-T/2": (get.GET, IMAGE, 0, get.SIZES["GET-T/2"]),
    "GET-M/2": (get.GET, IMAGE, 0, get.SIZES["GET-M/2"]),
    "GET 0.13M": (get.GET, DIGIT, 10, {**SMALL, "normalise": False}),
    "GET 0.13M normalised": (get.GET, DIGIT, 10, {**SMALL, "normalise": True}),
    "ViT-S/2": (vit.ViT, IMAGE, 0, vit.SIZES["ViT-S/2"]),
    "ViT-B/2": (vit.ViT, IMAGE, 0, vit.SIZES["ViT-B/2"]),
    "DDPM++": (unet.UNet, IMAGE, 0, {**DDPMPP, "dropout": 0.0, "augment": 9}),
    "DiT-S/2, 12 blocks": (dit.DiT, LATENT, 1000, dit.SIZES["DiT-S/2"]),
    "DiT-S/2, 28 blocks": (dit.DiT, LATENT, 1000, {**dit.SIZES["DiT-S/2"], "depth": 28}),  # the depth of XL
    "FPDM-S/2, 12 blocks": (fpdm.FPDM, LATENT, 1000, fpdm.SIZES["FPDM-S/2"]),
    "FPDM-S/2, 28 blocks": (fpdm.FPDM, LATENT, 1000, fpdm.SIZES["FPDM-S/2"]),
}
DEEP, STEPS = ("DiT-S/2, 28 blocks", "FPDM-S/2, 28 blocks"), 4  # steps of a chain
QUICK = {  # sizes with which a call takes milliseconds; of 12 and 28 blocks there are 3 and 7
    get.GET: {"width": 32, "heads": 1, "depth": 1, "equilibrium_depth": 1, "equilibrium_expansion": 2},
    vit.ViT: {"width": 32, "heads": 1, "depth": 1},
    dit.DiT: {"width": 32, "heads": 1},
    fpdm.FPDM: {"width": 32, "heads": 1},
    unet.UNet: {"width": 32, "multipliers": (1, 1), "blocks": 1},
}


@dataclass(frozen=True)
class Work:
    """A task of a network: a row in each precision, or where there are switches a row with each of them.

    `what` is sample (noise to images, six iterations of a GET, STEPS steps of DDIM of a DiT or an FPDM), train (loss of all
    six iterates, gradient, AdamW; of an FPDM with twelve iterations before twelve with gradient, the most that the published
    training draws) or denoise (a call of the denoiser). Goals are shares of the matmul peak; `gain` is bf16's goal as a
    multiple of fp32.
    """

    what: str
    size: str  # of NETWORKS
    batch: dict[str, int]  # by type of device
    goals: dict[str, float] = field(default_factory=dict)
    gain: float | None = None
    switches: tuple[str, ...] = ()


WORK = (
    Work("sample", "GET-T/2", {"cpu": 32, "cuda": 512}, {"fp32": 0.45, "bf16": 0.25}),
    Work("sample", "GET-M/2", {"cpu": 32, "cuda": 512}, {"fp32": 0.65, "bf16": 0.35}),
    Work("train", "GET-T/2", {"cpu": 16, "cuda": 64}),
    Work("train", "GET-M/2", {"cpu": 16, "cuda": 64}, {"fp32": 0.50, "bf16": 0.25}),
    Work(
        "train", "GET 0.13M", {"cpu": 128, "cuda": 128}, {"fp32": 16 / 40}
    ),  # 40 ms where the arithmetic takes 16 ms
    Work("train", "GET 0.13M normalised", {"cpu": 128, "cuda": 128}, {"fp32": 16 / 40}),
    Work("sample", "ViT-S/2", {"cpu": 8, "cuda": 512}),
    Work("sample", "ViT-B/2", {"cpu": 8, "cuda": 512}),
    Work("denoise", "DDPM++", {"cpu": 16, "cuda": 256}, {"fp32": 0.75}, gain=2.5),
    *(
        Work("denoise", f"{name}-S/2, {blocks} blocks", {"cpu": 8, "cuda": 256})
        for name in ("DiT", "FPDM")
        for blocks in (12, 28)
    ),
    *(Work("sample", size, {"cpu": 4, "cuda": 256}) for size in DEEP),
    *(Work("train", size, {"cpu": 8, "cuda": 64}) for size in DEEP),
    Work("sample", "GET-M/2", {"cpu": 8, "cuda": 512}, switches=("none", "attention unfused", "compiled")),
    Work("denoise", "DDPM++", {"cpu": 4, "cuda": 256}, switches=("none", "contiguous", "compiled")),
    Work("train", "GET-M/2", {"cuda": 64}, switches=("compiled",)),
    Work("train", "GET 0.13M", {"cpu": 128, "cuda": 128}, switches=("compiled",)),
)
SOLVER = Solver("iterate", 6, 0.0, "last", measure=False)
OPTIMISATION = Optimisation(
    nimg=1,
    batch=1,
    micro_batch=1,
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    clip=None,
    warmup_nimg=0,
    decay="none",
    decay_start_nimg=0,
    ema_half_life_nimg=1.0,
    ema_warmup=0.0,
    precision="fp32",
    compile=False,
    report_nimg=1,
    snapshots=(),
)
TRAINING = Config(
    config.Spec("get", "", {}), True, Equilibrium("zeros", 6, "unrolled", 0.8), 1, "l1", 0, OPTIMISATION
)
DENOISING = diffusion.Config(
    config.Spec("fpdm", "", {"learned_variance": True}),
    True,
    0.0,
    Diffusion(1000, 1e-4, 2e-2, True, "v", "learned"),
    "uniform",
    diffusion.FixedPoint("s_jfb", 3, 3),
    0,
    OPTIMISATION,
)


def main(arguments: list[str] | None = None) -> None:
    """Measure this machine and write its table as CSV and Markdown."""
    parser = argparse.ArgumentParser(prog="equilab.bench", description=__doc__)
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=ROOT / "results/bench", help="where the table goes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, one repeat: shows that it runs, measures nothing"
    )
    given = parser.parse_args(arguments)
    torch.compiler.config.force_disable_caches = True  # compile_s is of a first time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = [] if given.quick else [*commands(), *memory()]
    peak, rows = peaks(device, given.quick), []
    names = [name for name in peak if given.quick or peak[name] >= peak["fp32"] / SLOW]
    facts += [
        {"what": f"{name} is emulated here, its rows are left out"} for name in peak if name not in names
    ]
    with bar("bench", len(WORK), unit="work") as progress:
        for work in WORK:
            rows += measured(work, device, names, given.quick)
            progress.update()
    rows += [
        {"what": "matmul", "precision": name, "flop_s": rate, "times_fp32": rate / peak["fp32"]}
        for name, rate in peak.items()
    ]
    step = next(row["seconds"] for row in rows if (row["what"], row["size"]) == ("train", "GET 0.13M"))
    facts = [
        row
        | (
            goal_of(row["seconds"] < step, "less than GET 0.13M trains on it")
            if row["what"] == READING
            else {}
        )
        for row in facts
    ]
    call = task(
        Work("train", "GET 0.13M", {}), "", 2 if given.quick else 128, device, nullcontext, given.quick
    )
    facts += [
        *parts(call, device, 1 if given.quick else 10),
        *layers(device, names, given.quick),
        *training_memory(rows),
        *students(device, given.quick),
    ]
    facts += [error(device, given.quick)] if "bf16" in names else []
    name = machine(device)
    path = given.out / slug(name)
    write_table(path.with_name(f"{path.name}.csv"), rows + facts)
    write(path.with_name(f"{path.name}.md"), markdown(name, rows, facts))
    print(markdown(name, rows, facts), end="")


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its instructions and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: *(.+)$", info.read_text() if info.exists() else "", re.M)
    name, instructions = (
        (models or [platform.processor() or platform.machine()])[0],
        torch.backends.cpu.get_cpu_capability(),
    )
    return f"{name} ({instructions}), {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """Return `name` in small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def peaks(device: torch.device, quick: bool) -> dict[str, float]:
    """Return the FLOP/s of a large matrix product in each precision of the device."""
    found = {}
    for name in PRECISIONS[device.type]:
        precision(name, device)
        found[name] = matmul_peak(
            device, torch.bfloat16 if name == "bf16" else torch.float32, longest=0.05 if quick else 1.0
        )
    return found


def measured(work: Work, device: torch.device, names: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a work in the precisions `names`, none if it is not for this type of device; compiled where there
    is a compiler."""
    if device.type not in work.batch:
        return
    rate, batch = {}, 2 if quick else work.batch[device.type]
    single, calls = (
        (replace(work, what="denoise"), STEPS) if work.what == "sample" and work.size in DEEP else (work, 1)
    )
    operations = calls * flops(task(single, "", batch, torch.device("meta"), nullcontext, quick))
    for switch in work.switches or ("",):
        if switch == "compiled" and (quick or not shutil.which("c++")):
            continue
        for name in [SWITCHED[device.type]] if switch else names:
            row = _row(work, switch, name, device, quick, batch, operations)
            rate[name] = row["flop_s"]
            row["times_fp32"] = None if switch else rate[name] / rate["fp32"]
            if goal := work.goals.get(name):
                row |= goal_of(row["peak_share"] >= goal, f"{goal:.0%} of peak")
            if work.gain and name == "bf16":
                row |= goal_of(row["times_fp32"] >= work.gain, f"{work.gain:g} times fp32")
            yield row


def _row(
    work: Work, switch: str, name: str, device: torch.device, quick: bool, batch: int, operations: int
) -> dict[str, Any]:
    call = task(work, switch, batch, device, precision(name, device), quick)
    compiling = timed(call, device, warmup=0, repeats=1).median if switch == "compiled" else None
    start = time.perf_counter()
    most = peak_memory(call, device)
    large, once = (
        (2048, time.perf_counter() - start)
        if device.type == "cpu"
        else (8192, timed(call, device, warmup=1, repeats=1).median)
    )
    size, repeats = (128, 1) if quick else (large, min(max(int(SECONDS / once), 2), 30))
    a, b = (
        torch.randn(size, size, device=device, dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        for _ in range(2)
    )
    limit = lambda: 2 * size**3 / timed(lambda: a @ b, device, warmup=1, repeats=5).median  # noqa: E731
    before, seconds, after = limit(), timed(call, device, warmup=1, repeats=repeats), limit()
    rate, peak = operations / seconds.median, (before + after) / 2
    return {
        "what": work.what,
        "size": work.size,
        "precision": name,
        "switch": switch,
        "batch": batch,
        **columns_of(seconds),
        "images_s": batch / seconds.median,
        "flop_s": rate,
        "peak_flop_s": peak,
        "peak_share": rate / peak,
        "memory_mib": most / 2**20,
        "compile_s": compiling,
    }


def task(
    work: Work, switch: str, batch: int, device: torch.device, context: Callable, quick: bool
) -> Callable[[], None]:
    """Return a call that does the work once, its network in contexts that `context` makes."""
    kind, image, classes, _ = NETWORKS[work.size]
    net = network(work.size, device, quick).train(work.what == "train")
    net.to(memory_format=torch.contiguous_format if switch == "contiguous" else torch.channels_last)
    run = torch.compile(net) if switch == "compiled" else net
    attention = (
        functools.partial(sdpa_kernel, SDPBackend.MATH) if switch == "attention unfused" else nullcontext
    )
    noise = torch.randn(batch, *image, device=device)
    label = torch.arange(batch, device=device) % classes if classes else None
    loss, target, t = loss_of(TRAINING), torch.tanh(noise), torch.full((batch,), 500, device=device)
    along = (target, label, None)
    if kind in (dit.DiT, fpdm.FPDM):
        loss, along = (
            diffusion.loss_of(DENOISING),
            (noise, t, label, None if kind is dit.DiT else (2, 2) if quick else (12, 12)),
        )
    tied = Solver(
        "iterate", _blocks(work.size, quick) - 2 if kind is fpdm.FPDM else 1, 0.0, "last", measure=False
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=OPTIMISATION.lr, fused=device.type != "meta")
    forward = {
        get.GET: lambda: run(noise, label, None, SOLVER),
        vit.ViT: lambda: run(noise, label),
        unet.UNet: lambda: EDM(run, sigma_data=0.5)(noise, 1.0, label),
        dit.DiT: lambda: run(noise, t, label),
        fpdm.FPDM: lambda: run(noise, t, label, None, tied),
    }[kind]
    if work.what == "sample" and work.size in DEEP:
        implicit, chain = (
            kind is fpdm.FPDM,
            DENOISING.diffusion.chain(evenly(DENOISING.diffusion.timesteps, STEPS)),
        )
        predict = walk.implicit(run, tied) if implicit else walk.explicit(run)
        forward = lambda: walk.finish(
            walk.ddim(predict, noise, chain, label, eta=0.0, reuse=implicit, clamp=False)
        )

    def train() -> None:
        with context(), attention():
            loss(run, (target, *along) if kind in (dit.DiT, fpdm.FPDM) else (noise, *along)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.inference_mode(), context(), attention():
            forward()

    return train if work.what == "train" else infer


def network(size: str, device: torch.device, quick: bool) -> nn.Module:
    """Return a network of NETWORKS with its initial weights on `device`."""
    kind, image, classes, sizes = NETWORKS[size]
    small = {**QUICK[kind], **({"depth": _blocks(size, quick)} if kind is dit.DiT else {})} if quick else {}
    torch.manual_seed(0)
    with device:
        return kind(image, classes, **{**sizes, **small})


def _blocks(size: str, quick: bool) -> int:
    """Return the blocks that the name of a DiT or an FPDM says, a quarter of them where it is `quick`."""
    return int(size.split()[-2]) // (4 if quick else 1)


@torch.no_grad()
def layers(device: torch.device, names: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a layer of DiT, of an application of FPDM's layer, and of the same layer alone applied as often,
    without the two linear maps that take in the injection: each in a row of many, in turns."""
    batch, times = (2, 2) if quick else (4 if device.type == "cpu" else 64, 10)
    explicit, tied = (network(f"{family}-S/2, 12 blocks", device, quick).eval() for family in ("DiT", "FPDM"))
    tokens, width = tied.positions.shape[1:]
    h, condition = (torch.randn(batch, n, width, device=device) for n in (tokens, 1))
    solver = Solver("iterate", times, 0.0, "last", measure=False)

    def untied() -> None:
        z = h
        for k in range(times):
            z = explicit.stack[k % len(explicit.stack)](z, condition)

    def alone() -> None:
        modulation = tied.fixed.modulation(nn.functional.silu(condition))
        solver(lambda z, rows: tied.fixed.modulated(z, modulation), h)

    calls = {
        "a layer of DiT": untied,
        "an application of FPDM's layer": lambda: solver(tied.map(h, condition), h),
        "the same without the maps of its injection": alone,
    }
    work = [flops(call) for call in calls.values()]
    for name in names:
        with precision(name, device)():
            found = [
                seconds.median / times for seconds in in_turns(calls, device, 1 if quick else 15).values()
            ]
        for what, seconds, operations in zip(calls, found, work):
            row = {
                "what": what,
                "precision": name,
                "batch": batch,
                "seconds": seconds,
                "flop": operations / times,
            }
            if what != "a layer of DiT":
                row |= {"seconds_times": seconds / found[0], "flop_times": operations / work[0]}
                row |= goal_of(row["seconds_times"] <= 1.05 * row["flop_times"], "no more seconds than FLOPs")
            yield row


def training_memory(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield how much less memory a training step of FPDM takes than that of a DiT of the paper's depth (the paper: 60 percent)."""
    found = {
        (row["size"], row["precision"]): row["memory_mib"]
        for row in rows
        if row["what"] == "train" and row["size"] in DEEP
    }
    for name in dict.fromkeys(name for _, name in found):
        less = 1 - found[DEEP[1], name] / found[DEEP[0], name]
        yield {
            "what": "training memory of FPDM, less than that of DiT by",
            "precision": name,
            "share": less,
            **goal_of(less >= 0.6, "60%"),
        }


@torch.inference_mode()
def error(device: torch.device, quick: bool) -> dict[str, Any]:
    """Return how far an image of 18 Heun steps in bf16 is from fp32, by a DDPM++ of random weights, none near zero."""
    net, images = network("DDPM++", device, quick).eval().to(memory_format=torch.channels_last), {}
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    noise = torch.from_numpy(rng.noise(0, "bench", range(1), IMAGE)).to(device)
    for name in ("fp32", "bf16"):
        with precision(name, device)():
            images[name], _ = finish(
                Sampler("heun", 18, 0.002, 80.0, 7.0).run(EDM(net, sigma_data=0.5), noise, None)
            )
    off, spread = (images["bf16"] - images["fp32"]).abs(), images["fp32"].std().item()
    return {
        "what": "18 Heun steps in bf16 against fp32",
        "size": "DDPM++ of random weights",
        "batch": 1,
        "error_mean": off.mean().item(),
        "error_max": off.max().item(),
        "image_std": spread,
    }


def markdown(name: str, rows: list[dict[str, Any]], facts: list[dict[str, Any]]) -> str:
    """Return the table for people: matrix products and networks, then everything else as a list."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        if isinstance(value, float):
            return f"{value:.0%}" if column == "peak_share" else f"{value:.3g}"
        return "" if value is None else str(value)

    table = [columns, ["---"] * len(columns), *([cell(row, column) for column in columns] for row in rows)]
    others = [", ".join(f"{key} {cell(row, key)}" for key in row).removeprefix("what ") for row in facts]
    text = [
        f"# {name}, torch {torch.__version__}",
        "",
        f"`seconds` is the median of calls that take about {SECONDS} s together, at least two, after some that are not timed. "
        "`peak_share` is of `peak_flop_s`, the rate of a large square matrix product in the same precision right before and right "
        "after them; the rows `matmul` have the best of ten. `memory_mib` is the most that a call holds.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        *(f"- {other}" for other in others),
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
