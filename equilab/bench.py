"""`make bench`: how fast the models run on this machine, beside its own limit; writes results/bench/DEVICE.csv and .md."""

from __future__ import annotations

from equilab.core.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is imported

import argparse
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from equilab.core import config
from equilab.core.files import write
from equilab.core.machine import precision
from equilab.core.progress import bar
from equilab.diffusion import losses
from equilab.graph import PACKAGE
from equilab.metrics import fidelity
from equilab.metrics.counting import flops
from equilab.metrics.measuring import matmul_peak, peak_memory
from equilab.models import gdd
from equilab.models.precond import EDM
from equilab.solvers import Solver
from equilab.training import diffusion, distill, features, gan, loop, onestep, teacher

ROOT = PACKAGE.parent
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
SCORED, FEATURES = 2000, 2048  # images of a side, features of an image as Inception has
COMMANDS = {"import equilab": ("-c", "import equilab"), "equilab check": ("-m", "equilab", "check")}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}  # of the product beside a row

Calls = dict[str, Callable[[], object]]  # what a call does -> the call


@dataclass(frozen=True)
class Work:
    """A run of a study of which calls are measured, on so many images by type of device."""

    network: str  # its name in the table
    calls: Callable[[Subject], Calls]
    study: str  # its folder, from the root of the repository
    stage: str
    run: str | None
    batch: Mapping[str, int]
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of the network, in place of the run's own


class Subject:
    """A work in one precision on one device: what its calls are made from."""

    def __init__(self, work: Work, device: torch.device, name: str):
        sections = config.read(ROOT / work.study / "params.yaml")
        self.sections, self.device, self.precision = sections, device, name
        self.batch, self.run, self.classes = work.batch[device.type], work.run, sections["data"]["classes"]
        self.image = tuple(sections.get("latents", {}).get("shape") or sections["data"]["image"])
        entry = sections[work.stage][work.run] if work.run else sections[work.stage]
        endless = 1_000_000 * self.batch  # without a report on the way
        counts = {"batch": self.batch, "micro_batch": self.batch, "nimg": endless, "report_nimg": endless}
        optimisation = {**entry["optimisation"], **counts, "snapshots": [], "precision": name}
        self.entry = {**entry, "network": {**entry["network"], **work.sizes}, "optimisation": optimisation}

    def parse(self, kind: type) -> Any:
        """Return the run's config."""
        return config.parse(kind, self.entry, "bench")

    def build(self, settings: Any) -> nn.Module:
        """Return the run's network with random weights."""
        torch.manual_seed(0)
        net = settings.network.build(self.image, self.classes if settings.conditional else 0)
        return net.to(self.device, memory_format=torch.channels_last).eval()

    def normal(self, *shape: int) -> Tensor:
        """Return unit normals for every image of the batch."""
        return torch.randn(self.batch, *shape, device=self.device)

    def label(self, settings: Any) -> Tensor | None:
        """Return classes for the batch (B,), or None if the run has none."""
        return torch.arange(self.batch, device=self.device) % self.classes if settings.conditional else None

    def inference(self, call: Callable[[], object]) -> Callable[[], None]:
        """Return the call without gradient, in the precision that is measured."""
        context = precision(self.precision, self.device)

        def infer() -> None:
            with torch.inference_mode(), context():
                call()

        return infer

    def update(
        self, settings: Any, net: nn.Module, batch: Any, *losses: loop.Loss, **more: Any
    ) -> Callable[[], object]:
        """Return what makes the next update of the training loop, always on the same batch."""
        with tempfile.TemporaryDirectory() as folder:  # it holds no former state, and none will be saved
            run = loop.Run(net, settings.optimisation, 0, "bench", Path(folder), self.device, **more)
        return partial(next, loop.fit(run, lambda positions: batch, *losses))


def distilled(subject: Subject) -> Calls:
    """Return the calls of a GET or a ViT: noise to images, and an update on pairs."""
    settings = subject.parse(distill.Config)
    net, noise, label = subject.build(settings), subject.normal(*subject.image), subject.label(settings)
    given, init = (noise, label), None
    if settings.equilibrium:
        init = subject.normal(*net.state_shape)
        given = (noise, label, init, iterate(settings.equilibrium.iterations))
    pairs = (noise, noise.tanh(), label, init)
    return {
        "sample": subject.inference(lambda: net(*given)),
        "train": subject.update(settings, net, pairs, distill.loss_of(settings)),
    }


def denoised(subject: Subject) -> Calls:
    """Return the calls of a teacher: its denoiser, of which a sampler makes many, and an update."""
    settings = subject.parse(teacher.Config)
    net, noise, label = subject.build(settings), subject.normal(*subject.image), subject.label(settings)
    model, sigma = EDM(net, sigma_data=settings.sigma_data), subject.normal().exp()

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        return losses.edm(EDM(net, sigma_data=settings.sigma_data), *batch, settings.sigma_data)

    return {
        "call": subject.inference(lambda: model.denoise(noise, sigma, label)),
        "train": subject.update(settings, net, (noise.tanh(), noise, sigma, label), loss),
    }


def chained(subject: Subject) -> Calls:
    """Return the calls of a DiT or an FPDM: the network, of which a chain makes many, and an update.

    An FPDM's call has as many iterations as an update with the most that its training draws.
    """
    settings = subject.parse(diffusion.Config)
    net, noise, label = subject.build(settings), subject.normal(*subject.image), subject.label(settings)
    t = torch.full((subject.batch,), settings.diffusion.timesteps // 2, device=subject.device)
    given, counts = (noise, t, label), None
    if settings.fixed_point:
        counts = (settings.fixed_point.without, settings.fixed_point.steps)
        given = (noise, t, label, None, iterate(sum(counts)))
    return {
        "call": subject.inference(lambda: net(*given)),
        "train": subject.update(
            settings, net, (noise.tanh(), noise, t, label, counts), diffusion.loss_of(settings)
        ),
    }


def adversarial(subject: Subject) -> Calls:
    """Return the calls of a GDD student: noise to images, and an update of both players, without R1."""
    settings = subject.parse(gan.Config)
    net, noise, label = subject.build(settings), subject.normal(*subject.image), subject.label(settings)
    original = EDM(subject.build(settings), sigma_data=subject.sections["teacher"]["sigma_data"])
    gdd.prepare(net, settings.student.freeze)

    def untrained(name: str) -> nn.Module:
        own = config.parse(features.Config, subject.sections["features"], "bench")
        return own.network.build(subject.image, subject.classes)

    critic = gan.critic_of(settings, subject.run, subject.image, subject.classes, untrained, pretrained=False)
    generate, criticise = gan.losses_of(settings, net, critic, original)

    batch = ((noise.tanh(), label), (noise, label), (noise, label), (None,) * 3, 0.0, None)
    rival = ("discriminator", critic, settings.discriminator_lr)
    student = onestep.student(settings, net, original.sigma_data)
    return {
        "sample": subject.inference(lambda: student.generate(noise, label)),
        "train": subject.update(settings, net, batch, generate, criticise, rival=rival),
    }


def iterate(iterations: int) -> Solver:
    """Return the solver that applies the map so often."""
    return Solver("iterate", iterations, 0.0, "last", measure=False)


DIGITS, CIFAR, LATENTS = {"cpu": 128, "cuda": 128}, {"cpu": 4, "cuda": 128}, {"cpu": 2, "cuda": 64}
S2 = {"width": 384, "heads": 6}  # of DiT-S/2, in place of XL
WORKS = (
    Work("GET of digits", distilled, ".", "distill", "get-m", DIGITS),
    Work("ViT of digits", distilled, ".", "distill", "vit-l", DIGITS),
    Work("GDD of digits", adversarial, ".", "gan", "gdd", DIGITS),
    Work("GDD-I of digits", adversarial, ".", "gan", "gdd-i", DIGITS),
    Work("GET-T/2", distilled, "studies/get-paper", "distill", "get-t", CIFAR),
    Work("GET-M/2", distilled, "studies/get-paper", "distill", "get-m", CIFAR),
    Work("ViT-B/2", distilled, "studies/get-paper", "distill", "vit-b", CIFAR),
    Work("DDPM++", denoised, "studies/get-paper", "teacher", None, CIFAR),
    Work("DiT-S/2, 28 blocks", chained, "studies/fpdm-paper", "diffusion", "dit", LATENTS, S2),
    Work("FPDM-S/2, 24 iterations", chained, "studies/fpdm-paper", "diffusion", "fpdm", LATENTS, S2),
)


def measured(work: Work, device: torch.device, name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each call of a work, repeated for so many seconds, between two matrix products that tell the peak."""

    def peak() -> float:
        return matmul_peak(device, DTYPES[name], longest=seconds / 4)

    for what, call in work.calls(Subject(work, device, name)).items():
        operations = flops(
            call
        )  # also the warm-up: what is made once is made here, optimisers' moments among it
        memory, before = peak_memory(call, device), peak()
        row = {"work": work.network, "what": what, "precision": name, "batch": work.batch[device.type]}
        row |= timed(call, seconds)
        rate, limit = operations / row["seconds"], (before + peak()) / 2
        yield row | {
            "flop_s": rate,
            "peak_flop_s": limit,
            "peak_share": rate / limit,
            "memory_mib": memory / 2**20,
        }


def timed(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return the columns of a call's time: median and interquartile range, over calls that take so many seconds together."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=seconds)
    calls = len(found.times) * found.number_per_run
    return {"seconds": found.median, "seconds_iqr": found.iqr, "calls": calls}


def others(seconds: float) -> Iterator[dict[str, Any]]:
    """Yield rows of what is not in FLOPs: scores of features on the CPU, and what everyone waits for at the start."""
    features = torch.randn(2, SCORED, FEATURES)

    def score() -> None:
        fidelity.frechet(*(fidelity.statistics([side]) for side in features))
        fidelity.kid(*features, subsets=4, subset=1000, seed=0)
        fidelity.precision_recall(*features, neighbours=3)

    yield {"work": "features", "what": f"score {FEATURES:,}", "batch": SCORED, **timed(score, seconds)}
    for what, arguments in COMMANDS.items():
        command = [sys.executable, *arguments]
        start = partial(subprocess.run, command, cwd=ROOT, check=True, capture_output=True)
        yield {"work": "start", "what": what, **timed(start, seconds)}


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its instructions and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: *(.+)$", info.read_text() if info.exists() else "", re.M)
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """Return `name` in small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown(name: str, table: pd.DataFrame, left_out: list[str]) -> str:
    """Return the table for people."""
    lines = [
        f"# {name}, torch {torch.__version__}",
        "",
        "`seconds` is the median of so many `calls` after two that are not timed, `seconds_iqr` their interquartile range, "
        "`batch` the images in a call. `flop_s` counts matrix products, convolutions and attention by shape; `peak_share` is "
        "its share of `peak_flop_s`, the best rate of a large matrix product in the same precision, measured right before "
        "and right after. `memory_mib` is the most that a call holds beside weights and optimiser.",
        "",
        *(f"{precision} has no instructions of its own here, so no rows." for precision in left_out),
        "",
        table.to_markdown(index=False, floatfmt=".3g", missingval=""),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure this machine; print its table and write it as CSV and Markdown."""
    parser = argparse.ArgumentParser(prog="equilab.bench", description=__doc__)
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "results/bench")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a row's timed calls take together")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {name: matmul_peak(device, DTYPES[name]) for name in PRECISIONS[device.type]}
    names = [name for name in peaks if peaks[name] >= peaks["fp32"]]
    rows = []
    with bar("bench", len(names) * len(WORKS), unit="work") as progress:
        for work in WORKS:
            for each in names:
                rows += measured(work, device, each, given.seconds)
                progress.update()
    table = pd.DataFrame([*rows, *others(given.seconds)])
    name = machine(device)
    text = markdown(name, table, [each for each in peaks if each not in names])
    path = given.out / slug(name)
    write(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.9g"))
    write(path.with_suffix(".md"), text)
    print(text, end="")


if __name__ == "__main__":
    main()
