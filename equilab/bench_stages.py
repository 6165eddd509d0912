"""What `make bench` measures beside networks: commands, and the memory of stages."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from equilab import __main__  # before torch, as for the stages
from equilab.core import config, rng  # before torch, as for the stages
from equilab.data.pairset import PairSet
from equilab.graph import PACKAGE
from equilab.metrics.counting import Seconds, peak_memory, timed
from equilab.models import gdd
from equilab.models.precond import EDM
from equilab.training import gan, onestep

ROOT, CPU = PACKAGE.parent, torch.device("cpu")
SIZES = (
    (200, 12_000),
    (680, 24_000),
)  # pairs and scored images of the smoke study, with which memory must not grow
BATCH, READING = 128, "reading a batch of digits pairs"


def columns_of(seconds: Seconds) -> dict[str, float]:
    """Return the columns of a time."""
    return {"seconds": seconds.median, "seconds_min": seconds.fastest, "seconds_max": seconds.slowest}


def goal_of(reached: bool, goal: str) -> dict[str, str]:
    """Return the columns of a goal."""
    return {"goal": goal, "reached": "yes" if reached else "no"}


def commands() -> Iterator[dict[str, Any]]:
    """Yield the seconds of importing the package, and of `dvc repro` where everything is up to date."""

    def call(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)

    script = "import time; start = time.perf_counter(); import equilab; print(time.perf_counter() - start)"
    took = sorted(float(call("-c", script).stdout) for _ in range(5))
    seconds = Seconds(took[2], took[0], took[-1])
    yield {"what": "import equilab", **columns_of(seconds), **goal_of(seconds.median <= 0.2, "at most 0.2 s")}
    if (
        (ROOT / "dvc.lock").exists()
        and (ROOT / ".dvc").exists()
        and call("-m", "dvc", "status", "-q").returncode == 0
    ):
        seconds = timed(lambda: call("-m", "dvc", "repro"), CPU, warmup=0, repeats=3)
        yield {
            "what": "dvc repro, nothing to do",
            **columns_of(seconds),
            **goal_of(seconds.median <= 5, "at most 5 s"),
        }


def memory() -> Iterator[dict[str, Any]]:
    """Yield the most memory, tensors and all of Python, that making pairs, training on them and scoring images takes, few and
    many; and the seconds that reading a batch of pairs takes."""
    sections, before, threads = (
        config.read(ROOT / "studies/smoke/params.yaml"),
        Path.cwd(),
        torch.get_num_threads(),
    )
    run = next(name for name, entry in sections["distill"].items() if entry["network"]["kind"] == "get")
    least: dict[str, float] = {}
    scored = sections["evaluate"][run]  # by the same name
    scored["solver"] = scored["solver"][:1]
    with tempfile.TemporaryDirectory() as folder:
        for k, (count, samples) in enumerate(
            (SIZES[0], *SIZES)
        ):  # the first time for what is imported on the way
            sections["pairs"]["count"] = sections["distill"][run]["pairs"] = count
            sections["evaluator"]["samples"] = samples
            sections["study"]["seed"] += 1  # nothing is resumed
            Path(folder, "params.yaml").write_text(yaml.safe_dump(sections))
            for stage in (
                ["data"],
                ["teacher"],
                ["evaluator"],
                ["pairs"],
                ["distill", run],
                ["evaluate", run],
            ):
                if k and stage[0] in ("data", "teacher"):
                    continue
                most, name = _stage(folder, *stage), stage[0]
                if k and name != "evaluator":
                    size = f"{samples:,} images" if name == "evaluate" else f"{count:,} pairs"
                    row = {"what": f"memory of {name}", "size": size, "memory_mib": most}
                    yield row | (goal_of(most <= 1.05 * least[name], "does not grow") if k == 2 else {})
                least[name] = most
        pairs, draw = PairSet(Path(folder, "results/pairs")), rng.generator(0, "bench")
        seconds = timed(lambda: pairs.read(draw.integers(count, size=BATCH)), CPU, warmup=3, repeats=50)
        yield {"what": READING, "batch": BATCH, **columns_of(seconds)}
        os.chdir(before)
    torch.set_num_threads(threads)


def parts(call: Callable[[], None], device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield where the time of a step of the small GET goes: the share of each kind of operator in the seconds of all."""
    call()
    with torch.profiler.profile() as profiler:
        for _ in range(repeats):
            call()
    field = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    own = {each.key: getattr(each, field) for each in profiler.key_averages()}
    total = sum(own.values())
    for kind, word in {
        "matrix products": "mm",
        "GELU": "gelu",
        "attention": "attention",
        "LayerNorm": "layer_norm",
        "copies": "copy_",
        "joining the gradients of q, k and v": "aten::cat",
        "everything else": "",
    }.items():
        yield {
            "what": f"a step of GET 0.13M: {kind}",
            "share": sum(own.pop(key) for key in [*own] if word in key) / total,
        }


def students(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the seconds of an update of the digits study's GDD and GDD-I: of either player, of the feature networks, with R1,
    and of an image, taken in turns; the memory of a whole update, optimisers included; how much faster GDD-I is, and how much faster it would
    be if but the output layer were trained: what freezing cannot save. All weights are random."""
    sections, batch = config.read(ROOT / "params.yaml"), 4 if quick else 128
    read = lambda stage, run=None: __main__._config(sections, stage, run, ROOT / "params.yaml")[0]  # noqa: E731
    made = {
        run: _update(read, entry, frozen, batch, device)
        for run, entry, frozen in (
            ("gdd", "gdd", None),
            ("gdd-i", "gdd-i", None),
            ("output", "gdd", lambda layer: layer.group != "output"),
        )
    }
    parts, single = (
        ("generator", "discriminator", "discriminator with R1"),
        ("features", "sampling", "evaluation"),
    )
    found = in_turns(
        {(run, part): made[run][part] for run in made for part in parts}
        | {("gdd", part): made["gdd"][part] for part in single},
        device,
        1 if quick else 20,
    )
    interval, totals, most = read("gan", "gdd").r1.interval, {}, {}
    for run in made:
        lazy = (found[run, parts[2]].median - found[run, parts[1]].median) / interval
        totals[run] = found[run, parts[0]].median + found[run, parts[1]].median + lazy
        most[run] = peak_memory(made[run]["update"], device) / 2**20
    for run in ("gdd", "gdd-i"):
        for part in parts:
            yield {"what": f"{run}: {part}", "batch": batch, **columns_of(found[run, part])}
        row = {
            "what": f"{run}: update, R1 every {interval}",
            "batch": batch,
            "seconds": totals[run],
            "memory_mib": most[run],
        }
        yield row | (goal_of(most[run] < most["gdd"], "less memory than gdd") if run == "gdd-i" else {})
    yield {
        "what": "gdd: feature networks, one pass, no gradient",
        "batch": batch,
        **columns_of(found["gdd", "features"]),
    }
    same = found["gdd", "evaluation"].median / found["gdd", "sampling"].median
    yield {
        "what": "gdd: sampling in one step, against an evaluation of the teacher",
        "batch": batch,
        **columns_of(found["gdd", "sampling"]),
        "times_faster": same,
        **goal_of(same >= 0.95, "the teacher's speed times its nfe"),
    }
    gain, bound = (totals["gdd"] / totals[run] for run in ("gdd-i", "output"))
    why = "the passes through frozen layers and the discriminator: with the output layer alone trained, it would be times_at_most"
    yield {
        "what": "gdd-i against gdd",
        "times_faster": gain,
        **goal_of(gain >= 1.3, "1.3 times as fast"),
        **({} if gain >= 1.3 else {"times_at_most": bound, "stopped by": why}),
    }


def _update(
    read: Callable, run: str, frozen: Callable | None, batch: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return the parts of an update of a student as calls, two of them with new optimisers, and one pass of each network."""
    data, one = read("data"), read("gan", run)
    torch.manual_seed(0)
    net = one.network.build(data.image, data.classes).to(device, memory_format=torch.channels_last)
    gdd.prepare(net, one.student.freeze) if frozen is None else gdd.freeze(net, frozen)
    bare = lambda name: read("features").network.build(data.image, data.classes)  # noqa: E731
    critic = gan.critic_of(one, run, data.image, data.classes, bare, pretrained=False).to(device)
    teacher = EDM(net, sigma_data=1.0)
    losses, student = gan.losses_of(one, net, critic, teacher), onestep.student(one, net, 1.0)
    noise, label = (
        torch.randn(batch, *data.image, device=device),
        torch.arange(batch, device=device) % data.classes,
    )
    trained = [[p for p in player.parameters() if p.requires_grad] for player in (net, critic)]

    def part(mover: int, weight: float) -> None:
        for k, parameters in enumerate(trained):
            for parameter in parameters:
                parameter.requires_grad_(k == mover)
                parameter.grad = None
        batches = ((noise.tanh(), label), (noise, label), (noise, label), (None,) * 3, weight, None)
        found = losses[mover]((net, critic)[mover], batches)
        (found[0] if isinstance(found, tuple) else found).backward()

    def update() -> None:
        optimisers = [torch.optim.Adam(parameters) for parameters in trained]
        for mover, optimiser in [*enumerate(optimisers)] * 2:  # the second time beside what they remember
            part(mover, 1e-4 * mover)  # with R1, where an update takes most
            optimiser.step()

    networks, sigma = critic.discriminator.networks, torch.full((batch,), 80.0, device=device)
    single = {
        "features": lambda: [network.features(noise) for network in networks],
        "sampling": lambda: student.generate(noise, label),
        "evaluation": lambda: teacher.denoise(80 * noise, sigma, label),
    }
    return {
        "generator": partial(part, 0, 0.0),
        "discriminator": partial(part, 1, 0.0),
        "discriminator with R1": partial(part, 1, 1e-4),
        "update": update,
        **{name: torch.no_grad()(call) for name, call in single.items()},
    }


def in_turns(calls: dict[Any, Callable[[], None]], device: torch.device, repeats: int) -> dict[Any, Seconds]:
    """Return the seconds of calls that take turns: a neighbour who comes and goes disturbs them alike."""
    taken = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            taken[name].append(timed(call, device, warmup=0, repeats=1).median)
    return {
        name: Seconds(statistics.median(each[1:]), min(each[1:]), max(each[1:]))
        for name, each in taken.items()
    }


def _stage(folder: str, *arguments: str) -> float:
    """Run a stage in `folder` and return its peak memory in MiB."""
    python = []

    def call() -> None:
        tracemalloc.start()
        status = __main__.main([*arguments, "--params", f"{folder}/params.yaml"])
        python.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        if status:
            raise SystemExit(f"bench: stage {arguments[0]} of the smoke study failed")

    return (peak_memory(call, CPU) + python[0]) / 2**20
