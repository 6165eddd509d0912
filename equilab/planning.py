"""What a whole study takes, before anything runs, and how much of it is left: `python -m equilab plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from equilab.claims.tests import short
from equilab.core.checked import read_table
from equilab.core.config import UserError, plain, read_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.progress import bar
from equilab.graph import STAGES
from equilab.study import Replicate, Sections, job_of, module_of

USUAL_SHARE = 0.3  # of the matmul peak that small networks reach
START = 5  # seconds in which a job starts
HEAD = f"""\
- Images are seen in training, or made. Disk is that of results.
- Time is that of one job after another, at {{speed}}, and {START} s for each to start.
- Left is what has no results of the params as they are, or no weights; of a training that has begun, the rest.
- Not counted are the features of images, and stages without networks."""


@dataclass(frozen=True)
class Speed:
    """How fast this machine is: its matmul peak in FLOP/s, and which share of it runs reach."""

    peak: float
    usual: float  # share of a run that was not measured
    shares: dict[str, float]  # of runs by their folders below results/

    def seconds(self, flops: int | float, job: Job) -> float:
        """Return how long a job takes."""
        of = "/".join(part for part in (job.stage, job.run) if part)
        return START + flops / (self.shares.get(of, self.usual) * self.peak)

    def __str__(self) -> str:
        """The share and the peak, in words."""
        known = ", as the stage cost measured" if self.shares else ""
        return f"{self.usual:.0%} of this machine's {self.peak / 1e12:.2f} TFLOP/s{known}"


def speed_of(job: Job) -> Speed:
    """Return how fast this machine is, measured now; the shares are those of the study's stage `cost`, if it ran on such a device."""
    import torch

    from equilab.core.machine import device_of, environment
    from equilab.metrics import measuring

    torch.set_num_threads(job.study.threads)
    peak = measuring.matmul_peak(device_of(job), torch.float32, longest=0.1)
    folder = folder_of("cost")
    if not (folder / "cost.csv").exists() or not (folder / "cost.json").exists():
        return Speed(peak, USUAL_SHARE, {})
    there = read_json(folder / "cost.json", environment=dict[str, Any])["environment"]
    if there.get("device") != environment(job)["device"]:
        return Speed(peak, USUAL_SHARE, {})
    costs = read_table(folder / "cost.csv", ("of", "what", "peak_share"), ("peak_share",))
    # of training steps, which not every study measures
    trained = costs[(costs["what"] == "train") & costs.get("as_trained", pd.Series()).isin([True])]
    return Speed(peak, float(costs["peak_share"].median()), dict(zip(trained["of"], trained["peak_share"])))


def planned(sections: Sections) -> str:
    """Return as a page what every stage of a study takes, and all of them; the study's folder is the current one."""
    speed = speed_of(job_of(sections, "data", Replicate()))
    rows, unknown, memory = [], [], (0, "")
    stages = [stage for stage in STAGES if sections.has(stage)]
    with bar("plan", len(stages), unit="stage") as progress:  # minutes for networks of the papers' sizes
        for stage in stages:
            try:
                plans = _plans(sections, stage)
                rows.append(_row(stage, plans, speed))
                memory = max([memory, *((plan.memory, job.name) for job, plan, _ in plans)])
            except UserError as error:
                unknown.append(f"{stage} is not counted: {error}")
            progress.update()
    table = pd.DataFrame(rows)
    table.loc[len(table)] = {**table.sum(numeric_only=True), "stage": "all"}
    parts = [
        HEAD.format(speed=speed),
        _shown(table).to_markdown(index=False, disable_numparse=True),
    ]
    if memory[0]:
        held = f"weights, gradient, moments and average of {memory[1]} take {size(memory[0])}"
        parts.append(f"Memory: {held}; the activations of a batch come on top, and are not counted.")
    return "\n\n".join([f"# {sections.study.name}", *parts, *unknown])


def _plans(sections: Sections, stage: str) -> list[tuple[Job, Plan, float]]:
    """Return all jobs of a stage, each with its plan and the share of it that is left; replicates cost the same.

    Raises: UserError if a job cannot be planned.
    """
    plans, known = [], {}
    for replicate in sections.jobs(stage):
        job = job_of(sections, stage, replicate)
        if replicate.run not in known:
            config = job.read(stage, *replicate)
            known[replicate.run] = module_of(stage, config).plan(config, job)()
        plans.append((job, known[replicate.run], _left(job, known[replicate.run])))
    return plans


def _left(job: Job, plan: Plan) -> float:
    """Return which share of a job is left to do."""
    if all(path.exists() for path in STAGES[job.stage].outputs(job.out)):
        summary = job.out / "summary.json"
        config = plain(job.read(job.stage, job.run, job.seed))
        return 0.0 if not summary.exists() or read_json(summary).get("config", config) == config else 1.0
    state = Path(".equilab/scratch", job.name, "state.safetensors")
    if not state.exists() or not plan.images:
        return 1.0
    from equilab.models.checkpoint import read_metadata

    return 1.0 - read_metadata(state)["nimg"] / plan.images


def _row(stage: str, plans: list[tuple[Job, Plan, float]], speed: Speed) -> dict[str, str | int | float]:
    """Return the line of a stage; what is not known is nan."""
    seconds = [speed.seconds(plan.flops, job) for job, plan, _ in plans]
    left = [share for _, _, share in plans]
    return {
        "stage": stage,
        "jobs": len(plans),
        "left": sum(share > 0 for share in left),
        "images": sum(plan.images for _, plan, _ in plans),
        "FLOPs": sum(plan.flops for _, plan, _ in plans),
        "teacher evaluations": sum(plan.teacher_calls for _, plan, _ in plans),
        "disk": sum(np.nan if plan.disk is None else plan.disk for _, plan, _ in plans),
        "time": sum(seconds),
        "time left": sum(share * each for share, each in zip(left, seconds)),
    }


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table in words."""
    formats = dict.fromkeys(("jobs", "left"), "{:.0f}".format)
    formats |= dict.fromkeys(
        ("images", "FLOPs", "teacher evaluations"), lambda value: short(value) if value else ""
    )
    formats |= {
        "disk": lambda value: "not known" if np.isnan(value) else size(value) if value else "",
        "time": duration,
        "time left": duration,
    }
    return pd.DataFrame({name: column.map(formats.get(name, str)) for name, column in table.items()})


def size(count: int | float | None) -> str:
    """Return so many bytes in words."""
    if count is None:
        return "not known before the images are read"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def duration(seconds: int | float) -> str:
    """Return so many seconds in words."""
    for unit, length, least in (("years", 365 * 86400, 2), ("days", 86400, 2), ("h", 3600, 1.5)):
        if seconds >= least * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds / 60:.1f} min"
