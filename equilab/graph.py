"""The table of stages: the module of each, which jobs it has, what it reads and what it writes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from equilab.core.stages import GENERATORS, MEASUREMENTS


class Read(NamedTuple):
    """A file or folder that a stage reads, from the study's folder; a study without the stage `of` has none."""

    path: str
    of: str = ""


def result(path: str) -> Read:
    """Return what a stage reads from the results of another, the first word of `path`."""
    return Read(f"results/{path}", Path(path).parts[0])


@dataclass(frozen=True)
class Stage:
    """A stage: its module, which jobs its section makes, what it reads, what it writes into its results folder.

    `jobs`: one; one for each entry; one for each seed of an entry; or one for each seed of the run that an entry is `of`.
    `family`: the family whose code it runs, or where its section names that: `network`, the run it is `of`, its `runs`.
    `source`: the key of an entry that names a run whose results it reads, `${item.KEY}` in `reads` as a folder.
    `names`: which results it reads besides, since they are named: those of the "trained" or "evaluated" runs that its section lists as
    `runs`, or those "shown" by its notebook.
    `cached` results are kept by DVC, `committed` ones by git; `params` are further sections that it depends on.
    `of_studies`: what it reads of each study whose folder its section lists as `studies`.
    `chained`: a run may be trained from another of its stage, and what that took counts for it as well.
    `teacher_calls`: the evaluations of the teacher for a training image of its runs, where neither pairs nor a consistency
    loss in their config say how many; nan where there is no teacher.
    """

    module: str
    jobs: Literal["one", "entries", "seeds", "of"] = "one"
    family: str = ""
    source: str = ""
    names: Literal["", "trained", "evaluated", "shown"] = ""
    reads: tuple[Read, ...] = ()
    cached: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    of_studies: tuple[str, ...] = ()
    optional: bool = False  # a study may do without
    distributed: bool = False  # several processes share its work; another is done by the first of them
    measures: bool = False  # seconds and memory: in a process of its own, and nothing runs beside it
    chained: bool = False
    teacher_calls: float = math.nan

    @property
    def threads_key(self) -> str:
        """The key of the section `study` that says how many threads of the CPU a job has."""
        return "threads" if self.jobs == "one" else "run_threads"

    def outputs(self, out: Path) -> list[Path]:
        """Return the files and folders that a job writes whose results folder is `out`."""
        return [Path(os.path.normpath(out / name)) for name in self.cached + self.committed]


DATA, EVALUATOR, PAIRS = result("data"), result("evaluator"), result("pairs")
TEACHER = result("teacher/weights.safetensors")
VAE = Read("${latents.vae}", "latents")
CLAIMS = result("claims"), Read("results/measured.csv", "claims")
LOGGED = ("log.csv", "summary.json")
TRAINED = {
    "cached": ("weights.safetensors", "snapshots"),
    "committed": LOGGED,
    "optional": True,
    "distributed": True,
}
CLASSIFIER = {"cached": ("weights.safetensors",), "committed": LOGGED, "distributed": True}
TABLES = (
    result("teacher/summary.json"),
    result("pairs/meta.json"),
    result("evaluator/summary.json"),
    *(result(name) for name in (*GENERATORS[1:], "evaluate", *MEASUREMENTS)),
)
STAGES = {
    "data": Stage("equilab.data.images", cached=("",)),
    "evaluator": Stage("equilab.training.evaluator", reads=(DATA,), **CLASSIFIER),
    "teacher": Stage("equilab.training.teacher", family="edm", reads=(DATA,), **TRAINED),
    "pairs": Stage(
        "equilab.training.pairs",
        family="edm",
        reads=(TEACHER,),
        cached=("",),
        optional=True,
        distributed=True,
    ),
    "latents": Stage(
        "equilab.data.latents", reads=(DATA, VAE), cached=("",), optional=True, distributed=True
    ),
    "distill": Stage("equilab.training.distill", jobs="seeds", family="network", reads=(PAIRS,), **TRAINED),
    "diffusion": Stage(
        "equilab.training.diffusion",
        jobs="seeds",
        family="network",
        reads=(DATA, result("latents")),
        params=("latents",),
        **TRAINED,
    ),
    "features": Stage("equilab.training.features", reads=(DATA,), optional=True, **CLASSIFIER),
    "gan": Stage(
        "equilab.training.gan",
        jobs="seeds",
        family="gdd",
        reads=(DATA, TEACHER, result("features/weights.safetensors")),
        teacher_calls=0.0,  # for the loss of a GAN
        **TRAINED,
    ),
    "consistency": Stage(
        "equilab.training.consistency", jobs="seeds", family="cd", reads=(DATA, TEACHER), **TRAINED
    ),
    "progressive": Stage(
        "equilab.training.progressive",
        jobs="seeds",
        family="pd",
        source="teacher",
        chained=True,
        teacher_calls=2.0,  # its two steps
        reads=(DATA, Read("${item.teacher}/weights.safetensors")),
        **TRAINED,
    ),
    "evaluate": Stage(
        "equilab.stages.evaluate",
        jobs="of",
        family="of",
        source="of",
        reads=(DATA, EVALUATOR, PAIRS, Read("${item.of}"), VAE),
        cached=("samples.npy",),
        committed=("metrics.json", "sweep.csv", "curve.csv", "iterates.npz"),
        params=("latents",),
        distributed=True,
    ),
    "relative": Stage(
        "equilab.stages.relative",
        names="evaluated",
        reads=(DATA, EVALUATOR),
        committed=("relative.csv",),
        optional=True,
    ),
    "activation": Stage(
        "equilab.stages.activation",
        family="runs",
        names="trained",
        committed=("activation.csv",),
        optional=True,
    ),
    "cost": Stage(
        "equilab.stages.cost",
        family="runs",
        names="trained",
        committed=("cost.csv", "cost.json"),
        measures=True,
    ),
    "claims": Stage(
        "equilab.stages.claims",
        reads=TABLES,
        committed=("", "../claims.md", "../measured.csv", "../measured.md", "../metrics"),
        params=("comparisons",),
    ),
    "scoreboard": Stage(
        "equilab.stages.scoreboard",
        reads=CLAIMS,
        of_studies=("results/claims", "results/measured.csv"),
        committed=("../scoreboard.csv", "../scoreboard.md"),
        optional=True,
    ),
    "notebook": Stage(
        "equilab.stages.notebook",
        jobs="entries",
        names="shown",
        reads=(result("evaluator/summary.json"),),
        committed=("",),
        params=("comparisons",),
    ),
    "report": Stage(
        "equilab.stages.report",
        reads=(
            result("notebook"),
            *TABLES,
            Read("results/claims.md", "claims"),
            Read("results/measured.md", "claims"),
            Read("results/scoreboard.md", "scoreboard"),
        ),
        committed=("",),
    ),
}
OTHERS = ("study", "comparisons", "resources")  # sections that are no stage's
