"""What `make bench` measures beside networks: commands, and the memory of stages."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from equilab import __main__, config  # before torch, as for the stages
from equilab.graph import PACKAGE
from equilab.metrics.cost import Seconds, peak_memory, timed
from equilab.models import gdd
from equilab.models.precond import EDM
from equilab.training import gan

ROOT, CPU = PACKAGE.parent, torch.device("cpu")
PAIRS = (200, 680)  # of the smoke study, whose memory must not grow with them


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
    if (ROOT / "dvc.lock").exists() and (ROOT / ".dvc").exists() and call("-m", "dvc", "status", "-q").returncode == 0:
        seconds = timed(lambda: call("-m", "dvc", "repro"), CPU, warmup=0, repeats=3)
        yield {"what": "dvc repro, nothing to do", **columns_of(seconds), **goal_of(seconds.median <= 5, "at most 5 s")}


def memory() -> Iterator[dict[str, Any]]:
    """Yield the most memory, tensors and all of Python, that making pairs and training on them takes, few and many."""
    sections, before, threads = config.read(ROOT / "studies/smoke/params.yaml"), Path.cwd(), torch.get_num_threads()
    run = next(name for name, entry in sections["distill"].items() if entry["network"]["kind"] == "get")
    least: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for k, count in enumerate((PAIRS[0], *PAIRS)):  # the first time for what is imported on the way
            sections["pairs"]["count"] = sections["distill"][run]["pairs"] = count
            sections["study"]["seed"] += 1  # nothing is resumed
            Path(folder, "params.yaml").write_text(yaml.safe_dump(sections))
            for stage in (["data"], ["teacher"], ["pairs"], ["distill", run])[2 if k else 0 :]:
                most, name = _stage(folder, *stage), stage[0]
                if k:
                    row = {"what": f"memory of {name}", "size": f"{count:,} pairs", "memory_mib": most}
                    yield row | (goal_of(most <= 1.05 * least[name], "does not grow") if k == 2 else {})
                least[name] = most
        os.chdir(before)
    torch.set_num_threads(threads)


def students(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the seconds and memory of an update of the digits study's GDD and GDD-I: of either player, of the feature
    networks, with R1; and how much faster GDD-I is. All weights are random."""
    path, batch, totals = ROOT / "params.yaml", 4 if quick else 128, {}
    sections = config.read(path)
    read = lambda stage, run=None: __main__._config(sections, stage, run, path)[0]  # noqa: E731
    data = read("data")
    for run in ("gdd", "gdd-i"):
        one = read("gan", run)
        torch.manual_seed(0)
        net = one.network.build(data.image, data.classes).to(device, memory_format=torch.channels_last)
        gdd.prepare(net, one.student.freeze)
        bare = lambda name: read("features").network.build(data.image, data.classes)  # noqa: E731
        critic = gan.critic_of(one, run, data.image, data.classes, bare, pretrained=False).to(device)
        losses = dict(zip(("generator", "discriminator"), gan.losses_of(one, net, critic, EDM(net, sigma_data=1.0))))
        noise, label = torch.randn(batch, *data.image, device=device), torch.arange(batch, device=device) % data.classes
        trained = {name: [p for p in player.parameters() if p.requires_grad] for name, player in (("generator", net), ("discriminator", critic))}
        found = {}
        for part, weight in (("generator", 0.0), ("discriminator", 0.0), ("discriminator with R1", 1e-4)):
            name = part.partition(" ")[0]
            for other, parameters in trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(other == name)
                    parameter.grad = None
            batches = ((noise.tanh(), label), (noise, label), (noise, label), (None,) * 3, weight, None)

            def call():
                found = losses[name](net if name == "generator" else critic, batches)  # noqa: B023
                (found[0] if isinstance(found, tuple) else found).backward()

            most = peak_memory(call, device)
            found[part] = timed(call, device, warmup=1, repeats=1 if quick else 20)
            yield {"what": f"{run}: {part}", "batch": batch, **columns_of(found[part]), "memory_mib": most / 2**20}
        if run == "gdd":
            with torch.no_grad():
                seen = timed(lambda: [n.features(noise) for n in critic.discriminator.networks], device, warmup=1, repeats=1 if quick else 20)  # noqa: B023
            yield {"what": "gdd: feature networks, one pass, no gradient", "batch": batch, **columns_of(seen)}
        lazy = (found["discriminator with R1"].median - found["discriminator"].median) / one.r1.interval
        totals[run] = found["generator"].median + found["discriminator"].median + lazy
        most_gain = totals["gdd"] / (totals["gdd"] - found["generator"].median / 3) if run == "gdd" else most_gain
        yield {"what": f"{run}: update, R1 every {one.r1.interval}", "batch": batch, "seconds": totals[run]}
    gain = totals["gdd"] / totals["gdd-i"]
    why = "freezing saves weight gradients alone, a third of the generator's part: all of it would be times_at_most"
    yield {"what": "gdd-i against gdd", "times_faster": gain, **goal_of(gain >= 1.3, "1.3 times as fast"),
           **({} if gain >= 1.3 else {"times_at_most": most_gain, "stopped by": why})}  # fmt: skip


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
