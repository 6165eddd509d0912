"""A results folder as tidy tables: one row each, one column a thing.

`equilab.results("results")` returns a `Results`; its tables are plain pandas frames, read when they are first asked for. Two keys join
them: `of`, a trained run as params name it ("distill/get-m", or "teacher"), and `seed`, its replicate.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from equilab.claims.comparisons import Comparison, Point, check_comparisons, position
from equilab.core.config import UserError, nearest, read, read_json
from equilab.models.family import family

# counts in the summary of a training, where it has them
COUNTED = ("parameters", "parameters_trained", "flops_image", "train_flops_image")
# how the columns of scores begin
SCORES = ("fd", "fid", "kid", "l1", "precision", "recall", "inception_score")


@dataclass(frozen=True)
class Results:
    """The results folder of one study. `folder` is that folder; the study's params.yaml lies beside it."""

    folder: Path

    @cached_property
    def params(self) -> dict[str, Any]:
        """The sections of the study's params.yaml."""
        return read(self.folder.parent / "params.yaml")

    @property
    def study(self) -> str:
        """The name of the study."""
        return self.params["study"]["name"]

    @cached_property
    def settings(self) -> pd.DataFrame:
        """A row for each replicate and setting at test time.

        - `of`, `run`, `seed`, `family`, `label`; `position` in the list of params (0: the headline);
        - the setting, where it has such a thing: `method`, `steps`, `most_iterations` (at most so many for a call), `tolerance`,
          `pick`, `init`, `memory`, `mixing`, `blocks`, `budget`, `reuse`, `solver`, `eta`, `clamp`, ...;
        - what an image cost: `nfe`, `iterations` (mean over images, all calls together), `iterations_per_call`, `block_evals`, `flops`;
        - what the solver did: `residual` (relative, at the end), `residual_ratio` (that of the less noisy half of the timesteps over
          that of the noisier half, the first step left out), `diverged` (images);
        - scores, against training images (`_train`) and held-out ones (`_test`): `fd_` (or `fid_`), `kid_`; `precision`, `recall`,
          `inception_score`, and of generators that were distilled from pairs the mean absolute error `l1_held_out`, `l1_train`.
        """
        parts = []
        for path in self._evaluated():
            about = _json(path, "evaluate", "of", "seed", "family")
            sweep = _table(path.with_name("sweep.csv"), "evaluate")
            sweep.insert(0, "position", range(len(sweep)))
            if "budget" in sweep:  # a fixed point followed along timesteps
                sweep["residual_ratio"] = _residual_ratios(path.with_name("iterates.npz"), len(sweep))
            parts.append(sweep.assign(**_named(about)))
        table = pd.concat(parts, ignore_index=True)
        table["iterations_per_call"] = table["iterations"] / table["nfe"]
        if "most_iterations" not in table:  # a study without equilibrium generators
            table["most_iterations"] = np.nan
        return _keys_first(table, ["of", "run", "seed", "family", "label", "position"])

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each evaluated replicate.

        - `stage`, `run`, `of`, `seed`, `family`, `label`, `folder` (of what evaluate wrote);
        - `nimg` (training images seen), `parameters`, `parameters_trained`, `flops_image` (of an image), `train_flops_image`,
          `train_flops` (of all of the training), `teacher_calls` (network evaluations of the teacher for the training);
        - its config, keys joined by dots: `network.width`, `optimisation.lr`, `equilibrium.iterations`, ...; lists are tuples;
        - cost and scores at its headline setting, named as in `settings`;
        - `rise_train`, `rise_test`: the distance at the end of training over the lowest of all snapshots (1: the end is best);
        - `relative`: the distance of its images to those of the first run in `relative`, if the stage relative has run.
        """
        rows = []
        for path in self._evaluated():
            about = _json(path, "evaluate", "of", "seed", "family")
            summary = self._summary(about["of"], about["seed"])
            config = {key: value for key, value in _flat(summary["config"]).items() if key != "seed"}
            counted = {key: summary.get(key) for key in COUNTED}
            calls = self._teacher_calls(summary)
            named = {"stage": summary["stage"], **_named(about), "nimg": summary["nimg"]}
            rows.append({**named, **counted, "teacher_calls": calls, **config, "folder": path.parent})
        table = pd.DataFrame(rows)
        table["train_flops"] = table["train_flops_image"] * table["nimg"]
        table["parameters_trained"] = table["parameters_trained"].fillna(table["parameters"])
        table = table.merge(self._headline(), on=["of", "seed"]).merge(
            self._rises(), on=["of", "seed"], how="left"
        )
        if (self.folder / "relative" / "relative.csv").exists():
            table = table.merge(self._from_first(), on=["run", "seed"], how="left")
        table = table.drop(columns=[name for name in table if table[name].isna().all()])
        return _keys_first(table, ["stage", "run", "of", "seed", "family", "label"])

    @cached_property
    def snapshots(self) -> pd.DataFrame:
        """A row for each replicate and snapshot along its training, its end included: `of`, `run`, `seed`, `family`, `label`,
        `nimg`, `train_flops` spent until then, and distances (and L1) at the headline setting."""
        parts = []
        for path in self._evaluated():
            about = _json(path, "evaluate", "of", "seed", "family")
            summary = self._summary(about["of"], about["seed"])
            curve = _table(path.with_name("curve.csv"), "evaluate")
            if curve.empty or curve["nimg"].max() < summary["nimg"]:
                end = _table(path.with_name("sweep.csv"), "evaluate").head(1).assign(nimg=summary["nimg"])
                kept = [name for name in end if name == "nimg" or name.startswith(("fd_", "fid_", "l1_"))]
                curve = pd.concat([curve, end[kept]])
            flops = summary.get("train_flops_image", np.nan) * curve["nimg"]
            parts.append(curve.assign(train_flops=flops, **_named(about)))
        table = pd.concat(parts, ignore_index=True)
        return _keys_first(table, ["of", "run", "seed", "family", "label", "nimg", "train_flops"])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Measured seconds and memory, a row each: `of`, `seed`, `family`, `label`; `what` ("sample", "call" or "train"), `gradient`
        (of a training step), `as_trained` (whether the run was trained with it), `most_iterations`; `batch`, `seconds` of a batch
        (median), `seconds_min`, `seconds_max`, `images_s`, `memory_mib`, `flops`, `peak_share`.

        Raises: UserError if the stage cost has not run.
        """
        table = _table(self.folder / "cost" / "cost.csv", "cost")
        return self._joined(table.rename(columns={"iterations": "most_iterations"}))

    @cached_property
    def activation(self) -> pd.DataFrame:
        """How active layers are, a row for each run, layer and step: `of`, `seed`, `family`, `label`, `layer`, `depth`, `step`, `at`
        (noise level, timestep or iteration), `mean`, `rms`.

        Raises: UserError if the stage activation has not run.
        """
        return self._joined(_table(self.folder / "activation" / "activation.csv", "activation"))

    @cached_property
    def relative(self) -> pd.DataFrame:
        """The distance between the images of two runs of one seed, a row each: `seed`, `first`, `second`, `distance`; `first_of`,
        `second_of` name them as `of`.

        Raises: UserError if the stage relative has not run.
        """
        table = self._relative()
        names = self.runs.drop_duplicates("run").set_index("run")["of"]
        return table.assign(first_of=table["first"].map(names), second_of=table["second"].map(names))

    @cached_property
    def floor(self) -> pd.DataFrame:
        """What real images score, a row for each `measure`: `bootstrap`, training images drawn at random, as many as are scored of a
        run; `test`, the held-out images."""
        about = _json(self.folder / "evaluator" / "summary.json", "evaluator", "floor")
        return pd.DataFrame(about["floor"]).rename_axis("measure").reset_index()

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """What the study's params.yaml declares to be compared."""
        return check_comparisons(self.params)

    def compare(self, name: str) -> pd.DataFrame:
        """Return the rows of a declared comparison, a row for each side and seed of each pair.

        `pair` counts from 0; `side` is "runs" or "baseline" ("runs" alone where they stand in an order); `point` names the row in words.
        The other columns are those of the table that the comparison is over; for settings also those of their run, and what was
        measured of it: `train_seconds`, `train_seconds_min`, `train_seconds_max`, `train_memory`, and the same of `sample`.

        Raises: UserError if the study declares no such comparison, or a run of it has no results.
        """
        if name not in self.comparisons:
            raise UserError(f"the study declares no comparison {name!r}{nearest(name, self.comparisons)}")
        comparison = self.comparisons[name]
        parts = []
        for pair, sides in enumerate(comparison.pairs):
            for side, point in sides.items():
                rows = self._rows(comparison.table, point)
                if rows.empty:
                    raise UserError(
                        f"comparisons.{name}: {self.folder} has no results of {point}; run its stages first"
                    )
                parts.append(rows.assign(pair=pair, side=side, point=str(point)))
        return _keys_first(pd.concat(parts, ignore_index=True), ["pair", "side", "point", "of", "seed"])

    def _rows(self, table: str, point: Point) -> pd.DataFrame:
        """Return the rows of one point, a row for each seed; costs are of the first seed alone."""
        rows = self._settings_of_runs if table == "settings" else getattr(self, table)
        rows = rows[rows["of"] == point.run]
        if table == "settings":
            return rows[rows["position"] == position(self.params, point, "comparisons")]
        for column, value in point.at.items():
            rows = rows[rows[column].isna() if value is None else rows[column] == value]
        return rows

    @cached_property
    def _settings_of_runs(self) -> pd.DataFrame:
        """Return the settings with the columns of their runs, and with what was measured of these: of a training step as the run was
        trained, of a sampled batch at the setting's iterations. Seconds and memory are measured once, and repeated for every seed."""
        more = [column for column in self.runs if column not in self.settings]
        rows = self.settings.merge(self.runs[["of", "seed", *more]], on=["of", "seed"])
        if not (self.folder / "cost" / "cost.csv").exists():
            return rows
        costs = self.costs.rename(columns={"memory_mib": "memory"})
        as_trained = costs[(costs["what"] == "train") & costs["as_trained"].isin([True])]
        sampled = costs[costs["what"] == "sample"]
        for what, chosen, keys in (
            ("train", as_trained, ["of"]),
            ("sample", sampled, ["of", "most_iterations"]),
        ):
            measured = ["seconds", "seconds_min", "seconds_max", "memory"]
            renamed = chosen[[*keys, *measured]].rename(columns={name: f"{what}_{name}" for name in measured})
            rows = rows.merge(renamed, on=keys, how="left")
        return rows

    @property
    def score(self) -> str:
        """The distance's name as people write it: FID on Inception's features, FD on those of another network."""
        return "FID" if "fid_train" in self.settings else "FD"

    @property
    def distance(self) -> str:
        """The column of the distance to the training images."""
        return f"{self.score.lower()}_train"

    def iterates(self, of: str, seed: int = 0) -> dict[str, np.ndarray]:
        """Return the arrays of iterates.npz of a run's replicate: images of fixed noises, and traces of the solver.

        Raises: UserError if there is no such run, or its file is missing or damaged.
        """
        rows = self.runs[(self.runs["of"] == of) & (self.runs["seed"] == seed)]
        if rows.empty:
            known = ", ".join(sorted(self.runs["of"].unique()))
            raise UserError(f"{self.folder} holds no evaluated {of!r} of seed {seed}; it has {known}")
        return _arrays(rows["folder"].iloc[0] / "iterates.npz")

    def _evaluated(self) -> list[Path]:
        return sorted(self.folder.glob("evaluate/*/*/metrics.json"))

    def _summary(self, of: str, seed: int) -> dict[str, Any]:
        path = self.folder / of / ("" if of == "teacher" else str(seed)) / "summary.json"
        return _json(path, of, "stage", "config", "parameters", "nimg")

    def _headline(self) -> pd.DataFrame:
        """Return cost and scores of every replicate at its first setting."""
        rows = self.settings[self.settings["position"] == 0]
        kept = ["of", "seed", "nfe", "iterations", "block_evals", "flops", "residual", "diverged"]
        kept += [name for name in rows if name.startswith(SCORES)]
        return rows[[name for name in kept if name in rows]]

    def _rises(self) -> pd.DataFrame:
        """Return for every replicate how far its distances rose from the best snapshot to the last."""
        name = self.score.lower()
        kept = self.snapshots.sort_values("nimg").groupby(["of", "seed"])[[f"{name}_train", f"{name}_test"]]
        rise = kept.last() / kept.min()
        return rise.rename(columns=lambda column: column.replace(name, "rise")).reset_index()

    def _relative(self) -> pd.DataFrame:
        return _table(self.folder / "relative" / "relative.csv", "relative")

    def _from_first(self) -> pd.DataFrame:
        """Return for the runs of `relative` but its first, and their seeds, the distance between the images of both."""
        table = self._relative()
        table = table[table["first"] == table["first"].iloc[0]]
        return table.rename(columns={"second": "run", "distance": "relative"})[["run", "seed", "relative"]]

    def _teacher_calls(self, summary: dict[str, Any]) -> float:
        """Return how often the teacher was evaluated for a training: once for all in the sampling of pairs, twice an image in
        consistency distillation (a step of Heun's method), never for the loss of a GAN."""
        config = summary["config"]
        if summary["stage"] == "distill":
            return float(config["pairs"] * _calls(self.params["pairs"]["sampler"]))
        if summary["stage"] == "consistency" or config.get("consistency"):
            return 2.0 * summary["nimg"]
        return 0.0 if summary["stage"] == "gan" else float("nan")

    def _joined(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return a table with the labels of its families, what a row is of first."""
        labels = {name: family(name).label for name in table["family"].unique()}
        table = table.assign(label=table["family"].map(labels))
        return _keys_first(table, ["of", "seed", "family", "label"])


def results(folder: Path | str = "results") -> Results:
    """Return a study's results folder as tidy tables.

    Raises: UserError if it holds no evaluated run.
    """
    found = Results(Path(folder))
    if not found._evaluated():
        raise UserError(f"{folder} holds no evaluated run; run `dvc repro`, or give another results folder")
    return found


def _named(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that say what a row is of."""
    of, name = about["of"], about["family"]
    return {
        "of": of,
        "run": of.rpartition("/")[2],
        "seed": about["seed"],
        "family": name,
        "label": family(name).label,
    }


def _keys_first(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return table[[*keys, *(name for name in table if name not in keys)]]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested keys by their names joined with dots; lists as tuples, which pandas can group by."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def _calls(sampler: Mapping[str, Any]) -> int:
    """Return the network evaluations of an image: Heun's method evaluates twice a step, but for the last."""
    return 2 * sampler["steps"] - 1 if sampler["method"] == "heun" else sampler["steps"]


def _residual_ratios(path: Path, settings: int) -> list[float]:
    """Return for each setting of a chain the geometric mean of the last residuals in the less noisy half of its timesteps over that in
    the noisier half; nan where there is no fixed point, or too few steps. The first step, which has nothing to reuse, is left out."""
    arrays = _arrays(path)
    ratios = []
    for k in range(settings):
        ratio = np.nan
        if f"residual_{k}" in arrays and (half := (len(arrays[f"t_{k}"]) - 1) // 2):
            # (S, K), the noisiest step first; nan after the last iteration
            _, medians, _ = arrays[f"residual_{k}"]
            last = np.isfinite(medians).sum(1) - 1
            logs = np.log(medians[np.arange(len(medians)), last])
            ratio = np.exp(logs[-half:].mean() - logs[1 : 1 + half].mean())
        ratios.append(float(ratio))
    return ratios


def _json(path: Path, stage: str, *keys: str) -> dict[str, Any]:
    try:
        return read_json(path, *keys)
    except UserError:
        raise _unreadable(path, stage) from None


def _table(path: Path, stage: str) -> pd.DataFrame:
    """Return a table that a stage wrote, all of it; an empty one if the stage had nothing to write."""
    try:
        text = path.read_text()
        if text.strip() and not text.endswith("\n"):
            raise ValueError("cut short")
        return pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame()
    except (OSError, ValueError):
        raise _unreadable(path, stage) from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception:  # a damaged archive raises what its damage leads to
        raise _unreadable(path, "evaluate") from None


def _unreadable(path: Path, stage: str) -> UserError:
    return UserError(f"{path} is missing or damaged; run the stage {stage} again")
