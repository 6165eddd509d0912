"""`--set KEY=VALUE --out FOLDER`: a stage that trains, with other params, into a folder of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equilab.core import files
from equilab.core.config import UserError, digest, nearest, read_json, shown
from equilab.core.job import Job
from equilab.core.process import is_first
from equilab.graph import STAGES
from equilab.sampling.command import read_value
from equilab.study import Replicate, Sections, job_of

RECORD = "try.json"  # in the folder of a try: of which run it is, and what it sets
OTHERS = ("code", "imported", "bench")  # folders of results that are no stage's
TRAINED = [stage for stage, about in STAGES.items() if "log.csv" in about.committed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try(Job):
    """A job whose results lie in a folder of their own, as those of its run lie in the study's results."""

    folder: Path
    record: Mapping[str, Any]  # what its file says of it

    @property
    def name(self) -> str:
        """That of the job, and of the folder: its unfinished work and its lock are no other job's."""
        return f"{super().name}@{self.folder.name}-{digest(str(self.folder.resolve()))[:8]}"

    @property
    def out(self) -> Path:
        """The folder of the try, or one for its seed."""
        return self.folder if self.seed is None else self.folder / str(self.seed)

    def begin(self) -> None:
        """Write into the folder what it is for, before anything is trained."""
        if is_first():
            files.write_json(self.folder / RECORD, self.record)


def tries(
    sections: Sections, stage: str, jobs: list[Replicate], settings: list[str], folder: Path | None
) -> list[Try]:
    """Return these jobs of a run with other params (`optimisation.lr=1e-3`), each of which writes below `folder`.

    Raises: UserError if the stage does not train, a setting cannot be made, or the folder holds anything but this try.
    """
    if stage not in TRAINED:
        raise UserError(
            f"--set and --out go with a stage that trains: {', '.join(TRAINED)}; {stage} does not"
        )
    if folder is None:
        raise UserError("--set needs --out FOLDER: a try is no result of the study")
    run, values = jobs[0].run, dict(setting_of(each) for each in settings)
    record = {"stage": stage, "run": run, "set": values}
    _refuse_taken(folder, record)
    changed = with_values(sections, stage, run, values)
    found = [job_of(changed, stage, each) for each in jobs]
    return [Try(**vars(job), folder=folder, record=record) for job in found]


def setting_of(text: str) -> tuple[str, Any]:
    """Return the key and the value of `KEY=VALUE`, the value as params have it.

    Raises: UserError if it is none.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {text}: give a key of the run and its value, such as optimisation.lr=1e-3")
    return key, read_value(f"--set {key}", value)


def with_values(sections: Sections, stage: str, run: str | None, values: Mapping[str, Any]) -> Sections:
    """Return a study in which one run, or a stage without runs, has other values at some keys.

    Raises: UserError for a key that no group is there for.
    """
    entry = copy.deepcopy(dict(sections.entry(stage, run)[0]))
    for key, value in values.items():
        if key in ("seed", "seeds"):
            raise UserError(f"--set {key}: say --seed K instead, a seed of the run")
        *above, last = key.split(".")
        place = entry
        for index, name in enumerate(above):
            if name not in place:
                raise UserError(f"--set {key}: unknown key {name!r}{nearest(name, list(place))}")
            place = place[name]
            if not isinstance(place, dict):
                at = ".".join(above[: index + 1])
                raise UserError(f"--set {key}: {at} is {shown(place)}; set all of it: --set '{at}={{...}}'")
        place[last] = value
    section = entry if run is None else {**sections.values[stage], run: entry}
    return dataclasses.replace(sections, values={**sections.values, stage: section})


def _refuse_taken(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder of the study's own results, and one that holds anything but the same try."""
    results, place = Path("results").resolve(), folder.resolve()
    if results.is_relative_to(place) or (
        place.is_relative_to(results) and place.relative_to(results).parts[0] in (*STAGES, *OTHERS)
    ):
        raise UserError(
            f"--out {folder}: the study's own results lie there; give a folder of its own, results/try1"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: it is a file; give a folder")
    if not folder.exists() or not [path for path in folder.iterdir() if not path.name.startswith(".")]:
        return
    if not (folder / RECORD).exists():
        raise UserError(f"--out {folder}: it holds other files; give a folder that is empty or not there")
    before = read_json(folder / RECORD)
    if before != record:
        said = " ".join(f"{key}={shown(value)}" for key, value in before.get("set", {}).items()) or "nothing"
        raise UserError(
            f"--out {folder}: it holds a try of {before.get('stage')} {before.get('run') or ''} with {said} set; give "
            "another folder, or remove it"
        )
