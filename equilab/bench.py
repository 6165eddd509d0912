"""`make bench`: how fast the models run on this machine, against its own limit; writes results/bench/DEVICE.csv and .md."""

from __future__ import annotations

from equilab.core.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is imported

import argparse
import itertools
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
from torch import nn
from torch.utils.benchmark import Measurement, Timer

from equilab.core import config, like
from equilab.core.code import PACKAGE
from equilab.core.edge import answered
from equilab.core.files import write, write_table
from equilab.core.machine import precision
from equilab.core.progress import bar
from equilab.metrics import fidelity
from equilab.metrics.counting import flops
from equilab.metrics.measuring import matmul_peak, peak_memory
from equilab.models import gdd
from equilab.models.feature_networks import classifier_network
from equilab.models.precond import EDM
from equilab.sampling.generators import KINDS
from equilab.solvers import Solver
from equilab.training import diffusion, distill, features, gan, loop, onestep, teacher, trainer

ROOT = PACKAGE.parent
SCORED, FEATURES = 2000, 2048  # images of a side, features of an image as Inception has
COMMANDS = {"import equilab": ("-c", "import equilab"), "equilab check": ("-m", "equilab", "check")}

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """A run that a study declares, and on how many images its calls are measured."""

    network: str  # its name in the table
    study: str  # its folder, from the root of the repository
    stage: str
    run: str | None
    batch: Mapping[str, int]  # by type of device
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of the network, in place of the run's own


DIGITS, CIFAR, LATENTS = {"cpu": 128, "cuda": 128}, {"cpu": 2, "cuda": 128}, {"cpu": 2, "cuda": 64}
S2 = {"width": 384, "heads": 6}  # of DiT-S/2; the paper's XL/2 needs more memory than many a machine has
WORKS = (
    Work("GET of digits", ".", "distill", "get-m", DIGITS),
    Work("ViT of digits", ".", "distill", "vit-m", DIGITS),
    Work("GDD of digits", ".", "gan", "gdd", DIGITS),
    Work("GDD-I of digits", ".", "gan", "gdd-i", DIGITS),
    Work("GET-T/2", "studies/get-paper", "distill", "get-t", CIFAR),
    Work("GET-M/2", "studies/get-paper", "distill", "get-m", CIFAR),
    Work("ViT-B/2", "studies/get-paper", "distill", "vit-b", CIFAR),
    Work("DDPM++", "studies/cifar10", "teacher", None, CIFAR),
    Work("DiT-S/2, 28 blocks", "studies/fpdm-paper", "diffusion", "dit", LATENTS, S2),
    Work("FPDM-S/2, 24 iterations", "studies/fpdm-paper", "diffusion", "fpdm", LATENTS, S2),
)


class Subject:
    """A work on a device in one precision: its config, its network with random weights, noise and labels."""

    def __init__(self, work: Work, device: torch.device, name: str):
        self.sections = like.read(ROOT / work.study / "params.yaml")
        self.device, self.precision = device, name
        section, size = self.sections[work.stage], work.batch[device.type]
        entry = dict(section[work.run] if work.run else section)
        if entry.pop("seeds", None):
            entry["seed"] = 0
        endless = 1_000_000 * size  # images, without a report on the way
        changes = {"batch": size, "micro_batch": size, "precision": name, "snapshots": []}
        changes |= {"nimg": endless, "report_nimg": endless}
        changes |= {"decay": "none", "decay_start_nimg": 0, "warmup_nimg": 0}
        entry["network"] = entry["network"] | work.sizes
        entry["optimisation"] = entry["optimisation"] | changes
        self.config = config.parse(KINDS[work.stage].training.Config, entry, work.network)
        self.image = tuple(self.sections.get("latents", {}).get("shape", self.sections["data"]["image"]))
        self.classes = self.config.classes_of(self.sections["data"]["classes"])
        self.noise = torch.randn(size, *self.image, device=device)
        self.label = torch.arange(size, device=device) % self.classes if self.classes else None
        self.net = self.build()

    def build(self) -> nn.Module:
        """Return the run's network with random weights."""
        net = trainer.build(self.config.network, 0, "bench", self.image, self.classes)
        return net.to(self.device).eval()

    def inference(self, call: Call) -> Call:
        """Return the call without gradient, in the precision that is measured."""

        @torch.inference_mode()
        def infer() -> None:
            with precision(self.precision, self.device)():
                call()

        return infer

    def update(self, batch: Any, loss: loop.Loss, adversary: loop.Adversary | None = None) -> Call:
        """Return what makes the next update of the training loop, always on the same batch."""
        with tempfile.TemporaryDirectory() as folder:  # it holds no former state, and none will be saved
            run = loop.Run(self.net, self.config.optimisation, 0, Path(folder), self.device, adversary)
        return partial(next, loop.fit(run, lambda positions: batch, loss))


def distilled(subject: Subject) -> dict[str, Call]:
    """Return the calls of a GET or a ViT: noise to images, and an update on pairs."""
    given = [subject.noise, subject.label]
    if equilibrium := subject.config.equilibrium:
        given += [None, Solver("iterate", equilibrium.iterations, 0.0, "last", measure=False)]
    batch = distill.Batch(subject.noise, subject.noise.tanh(), subject.label, None)
    return {
        "sample": subject.inference(lambda: subject.net(*given)),
        "train": subject.update(batch, distill.loss_of(subject.config)),
    }


def denoised(subject: Subject) -> dict[str, Call]:
    """Return the calls of a teacher: its denoiser, which a sampler calls again and again, and an update."""
    model, given = EDM(subject.net, sigma_data=subject.config.sigma_data), (subject.noise, 1.0, subject.label)
    normal = torch.zeros(len(subject.noise), device=subject.device)
    batch = teacher.Batch(subject.noise.tanh(), subject.noise, normal, subject.label)
    return {
        "call": subject.inference(lambda: model.denoise(*given)),
        "train": subject.update(batch, teacher.loss_of(subject.config)),
    }


def chained(subject: Subject) -> dict[str, Call]:
    """Return the calls of a DiT or an FPDM: the network, which a chain calls again and again, and an update.

    An FPDM iterates as often in a call as in an update, which takes the most iterations that its training draws.
    """
    batch = diffusion.example(subject.config, subject.noise, subject.label)
    iterations = None if batch.iterations is None else diffusion.Iterations(0, sum(batch.iterations))
    given = subject.net, batch.noise, batch.t, batch.label, iterations
    return {
        "call": subject.inference(lambda: diffusion.output_of(*given)),
        "train": subject.update(batch, diffusion.loss_of(subject.config)),
    }


def adversarial(subject: Subject) -> dict[str, Call]:
    """Return the calls of a GDD student: noise to images, and an update of both networks, without R1."""
    settings, noise, label = subject.config, subject.noise, subject.label
    original = EDM(subject.build(), sigma_data=subject.sections["teacher"]["sigma_data"])
    gdd.prepare(subject.net, settings.student.freeze)
    spec = config.parse(features.Config, subject.sections["features"], "features").network
    seen = classifier_network(spec.build(subject.image, subject.classes))
    discriminator = gan.build_discriminator(settings, [seen], subject.image, subject.classes)
    adversary = gan.adversary_of(settings, subject.net, original, discriminator)
    fake = gan.Fake(noise, label)
    batch = gan.Batch(noise.tanh(), label, fake, fake)
    student = onestep.student(settings, subject.net, original.sigma_data)
    return {
        "sample": subject.inference(lambda: student.generate(noise, label)),
        "train": subject.update(batch, gan.generator_loss_of(settings, discriminator, original), adversary),
    }


CALLS = {"teacher": denoised, "distill": distilled, "diffusion": chained, "gan": adversarial}


def calls(work: Work, device: torch.device, name: str) -> dict[str, Call]:
    """Return what is measured of a work in a precision, by what it does."""
    return CALLS[work.stage](Subject(work, device, name))


def measured(call: Call, device: torch.device, name: str, seconds: float) -> dict[str, float]:
    """Return the columns of a call in a precision: its time, its FLOP/s against a matrix product's, its memory."""
    work = flops(call)  # the first call, in which optimisers make their moments
    memory, before = peak_memory(call, device), peak(device, name, seconds / 4)
    time = timed(call, seconds)
    limit = (before + peak(device, name, seconds / 4)) / 2
    rate = {"flop_s": work / time["seconds"], "peak_flop_s": limit}
    return time | rate | {"peak_share": rate["flop_s"] / limit, "memory_mib": memory / 2**20}


def peak(device: torch.device, name: str, longest: float) -> float:
    """Return the FLOP/s of a large matrix product in a precision, or of one that takes so many seconds."""
    with precision(name, device)():
        return matmul_peak(device, torch.bfloat16 if name == "bf16" else torch.float32, longest)


def timed(call: Call, seconds: float) -> dict[str, float]:
    """Return the columns of a call's time: median and interquartile range, over calls that take so many seconds together.

    They are three calls or more, each after one that is not timed.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    parts = [timer.blocked_autorange(min_run_time=seconds / 3) for _ in range(3)]
    (found,) = Measurement.merge(parts)
    calls = sum(len(part.times) * part.number_per_run for part in parts)
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


def precisions(device: torch.device) -> list[str]:
    """Return the precisions that the device has instructions for: what a CPU emulates is slower than fp32."""
    if device.type == "cuda":
        return ["fp32", "tf32", "bf16"]
    gains = peak(device, "bf16", 0.1) > peak(device, "fp32", 0.1)
    return ["fp32", "bf16"] if gains else ["fp32"]


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


def markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the table for people."""
    table = pd.DataFrame(rows, dtype=object).fillna("")  # whole numbers stay whole where some are missing
    lines = [
        f"# {name}, torch {torch.__version__}",
        "",
        "`seconds` is the median of so many `calls`, after some that are not timed, `seconds_iqr` their interquartile range, "
        "`batch` the images in a call. `flop_s` counts matrix products, convolutions and attention by shape; `peak_share` is "
        "its share of `peak_flop_s`, the best rate of a large matrix product in the same precision, measured right before "
        "and right after. `memory_mib` is the most that a call holds besides weights and optimiser. A CPU that has no "
        "instructions for bf16 has no rows for it.",
        "",
        table.to_markdown(index=False, floatfmt=".3g"),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure this machine; print its table and write it as CSV and Markdown."""
    parser = argparse.ArgumentParser(prog="equilab.bench", description=__doc__)
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "results/bench")
    parser.add_argument("--seconds", type=float, default=4.0, help="that a row's timed calls take together")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = precisions(device)
    rows = []
    with bar("bench", len(names) * len(WORKS), unit="work") as progress:
        for work, name in itertools.product(WORKS, names):
            about = {"precision": name, "batch": work.batch[device.type]}
            for what, call in calls(work, device, name).items():
                columns = about | measured(call, device, name, given.seconds)
                rows.append({"work": work.network, "what": what, **columns})
            progress.update()
    rows += others(given.seconds)
    name = machine(device)
    text, path = markdown(name, rows), given.out / slug(name)
    write_table(path.with_suffix(".csv"), rows)
    write(path.with_suffix(".md"), text)
    print(text, end="")


if __name__ == "__main__":
    sys.exit(answered(main, ["bench"]))
