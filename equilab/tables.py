"""A results folder as tidy tables: one row each, one column a thing.

`equilab.results("results")` returns a `Results`; its tables are plain pandas frames, read when they are first asked for. Two keys join
them: `of`, a trained run as params name it ("distill/get-m", or "teacher"), and `seed`, its replicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from scipy import stats

from equilab.claims.comparisons import Comparison, Point, Target, check_comparisons, position
from equilab.core.absent import absent_runs, without
from equilab.core.checked import read_arrays, read_table
from equilab.core.config import UserError, nearest, parse, read_json, unreadable
from equilab.core.like import read
from equilab.core.stages import GENERATORS, refuse_unknown
from equilab.diffusion.losses import CONSISTENCY_CALLS
from equilab.diffusion.settings import Sampler
from equilab.graph import STAGES
from equilab.models.family import family
from equilab.models.registry import FAMILIES

# columns that tables have even where a study has no use for them, or the stage that measures them has not run
SETTINGS = (
    "method",
    "steps",
    "most_iterations",
    "tolerance",
    "pick",
    "init",
    "blocks",
    "budget",
    "reuse",
    "diverged",
    "l1_held_out",
    "precision",
    "recall",
    "inception_score",
)
RUN = ("of", "seed", "family")
# what is read of files of results
EVALUATED = {"of": str, "seed": int, "family": Literal[tuple(FAMILIES)], "settings": int | None}
TRAINED = {
    "stage": str,
    "config": Annotated[dict[str, Any], Field(min_length=1)],
    "nimg": NonNegativeInt,
    "nimg_before": NonNegativeInt | None,
    "parameters": NonNegativeInt,
    "parameters_trained": NonNegativeInt | None,
    "flops_image": NonNegativeFloat | None,
    "train_flops_image": NonNegativeFloat | None,
}
DISTANCES = ("fd_train", "fid_train")
MEASURED = [f"{score}_{split}" for score in ("fd", "fid", "kid") for split in ("train", "test")]
MEASURED += ["l1_held_out", "l1_train", "precision", "recall", "inception_score"]
SECONDS = ("seconds", "seconds_min", "seconds_max", "memory_mib")
COSTS = (
    *RUN,
    "what",
    "gradient",
    "as_trained",
    "iterations",
    "batch",
    "seconds",
    "seconds_min",
    "seconds_max",
    "images_s",
    "memory_mib",
    "flops",
    "peak_share",
)
ACTIVATION = (*RUN, "layer", "depth", "step", "at", "mean", "rms", "judged_up_to")
RELATIVE = ("seed", "first", "second", "distance", "images", "noises")
CLAIMED = ("id", "part", "claim", "verdict", "effect", "seeds", "published", "where")
CLAIMS = (*CLAIMED[:6], "by_kid", *CLAIMED[6:], "differs")
# counts in the summary of a training, where it has them
COUNTED = ("parameters", "parameters_trained", "flops_image", "train_flops_image")
# how the columns of scores begin
SCORES = ("fd", "fid", "kid", "l1", "precision", "recall", "inception_score")


class NotRunError(UserError):
    """A stage has not run yet whose results are asked for."""


@dataclass(frozen=True)
class Results:
    """The results folder of one study. `folder` is that folder; the study's params.yaml lies beside it.

    `shows`: which results the tables hold, as a notebook declares them, so that it runs again when these change: stages of runs
    ("distill", and how they were evaluated), measurements ("cost"), claims ("claims/get", "measured"); None: all that there are.
    """

    folder: Path
    shows: tuple[str, ...] | None = None

    @cached_property
    def params(self) -> dict[str, Any]:
        """The sections of the study's params.yaml, without runs whose published weights are optional and not there."""
        study = self.folder.absolute().parent
        sections = read(study / "params.yaml")
        return without(sections, absent_runs(sections, study))

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
        for path in self._shown():
            about = self._about(path)
            sweep = _sweep(path, about)
            sweep.insert(0, "position", range(len(sweep)))
            if "budget" in sweep:  # a fixed point followed along timesteps
                sweep["residual_ratio"] = _residual_ratios(path.with_name("iterates.npz"), len(sweep))
            parts.append(sweep.assign(**_named(about)))
        table = self._of_shown(pd.concat(parts, ignore_index=True))
        table["iterations_per_call"] = table["iterations"] / table["nfe"]
        table = table.reindex(columns=list(dict.fromkeys([*table, *SETTINGS])))
        return _keys_first(table, ["of", "run", "seed", "family", "label", "position"])

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each evaluated replicate.

        - `stage`, `run`, `of`, `seed`, `family`, `label`, `folder` (of what evaluate wrote);
        - `nimg` (training images seen), `train_flops` (of all of the training), `teacher_calls` (network evaluations of the teacher
          for the training), of a student at the end of a chain those of the students before it included;
        - `parameters`, `parameters_trained`, `flops_image` (of an image), `train_flops_image`;
        - its config, keys joined by dots: `network.width`, `optimisation.lr`, `equilibrium.iterations`, ...; lists are tuples;
        - cost and scores at its headline setting, named as in `settings`;
        - `rise_train`, `rise_test`: the distance at the end of training over the lowest of all snapshots (1: the end is best);
        - `relative`: the distance of its images to those of the first run in `relative`, of the same noises, and `relative_others`, of
          other noises (of that run itself too), if the stage relative has run.
        """
        rows = []
        for path in self._shown():
            about = self._about(path)
            summary = self.summary(about["of"], about["seed"])
            config = {key: value for key, value in _flat(summary["config"]).items() if key != "seed"}
            counted = {key: summary.get(key) for key in COUNTED}
            calls = self._teacher_calls(summary)
            named = {"stage": summary["stage"], **_named(about), "nimg": _seen(summary)}
            rows.append({**named, **counted, "teacher_calls": calls, **config, "folder": path.parent})
        table = pd.DataFrame(rows)
        table["train_flops"] = table["train_flops_image"].astype(float) * table["nimg"]
        table["parameters_trained"] = table["parameters_trained"].fillna(table["parameters"])
        table = table.dropna(axis="columns", how="all")  # keys that no run sets
        table = table.merge(self._headline(), on=["of", "seed"])
        table = table.merge(self._rises(), on=["of", "seed"], how="left")
        table = self._of_shown(table.merge(self._from_first(), on=["of", "seed"], how="left"))
        return _keys_first(table, ["stage", "run", "of", "seed", "family", "label"])

    @cached_property
    def snapshots(self) -> pd.DataFrame:
        """A row for each replicate and snapshot along its training, its end included: `of`, `run`, `seed`, `family`, `label`,
        `nimg`, `train_flops` spent until then, as in `runs`, and distances (and L1) at the headline setting."""
        parts = []
        for path in self._shown():
            about = self._about(path)
            summary = self.summary(about["of"], about["seed"])
            snapshots = summary["config"].get("optimisation", {}).get("snapshots", ())
            curve = _scored(path.with_name("curve.csv"), ("nimg",), least=len(snapshots))
            if curve.empty or curve["nimg"].max() < summary["nimg"]:
                end = _sweep(path, about).head(1).assign(nimg=summary["nimg"])
                kept = [name for name in end if name == "nimg" or name.startswith(("fd_", "fid_", "l1_"))]
                curve = pd.concat([curve, end[kept]])
            curve["nimg"] += _before(summary)
            flops = float(summary.get("train_flops_image") or np.nan) * curve["nimg"]
            parts.append(curve.assign(train_flops=flops, **_named(about)))
        table = self._of_shown(pd.concat(parts, ignore_index=True))
        table = table.reindex(columns=list(dict.fromkeys([*table, "l1_held_out"])))
        return _keys_first(table, ["of", "run", "seed", "family", "label", "nimg", "train_flops"])

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Measured seconds and memory, a row each: `of`, `seed`, `family`, `label`; `what` ("sample", "call" or "train"), `gradient`
        (of a training step), `as_trained` (whether the run was trained with it), `most_iterations`; `batch`, `seconds` of a batch
        (median), `seconds_min`, `seconds_max`, `images_s`, `memory_mib`, `flops`, `peak_share`. Without rows if the stage cost has
        not run.
        """
        self._require_shown("cost")
        table = self._read("cost/cost.csv", COSTS, (*RUN, "what", *SECONDS), SECONDS)
        return self._joined(table.rename(columns={"iterations": "most_iterations"}))

    @cached_property
    def activation(self) -> pd.DataFrame:
        """How active layers are, a row for each run, seed, layer and step: `of`, `seed`, `family`, `label`, `layer`, `depth` (in the
        order of use), `step`, `at` (noise level, timestep or iteration), `mean`, `rms` (two readings of a layer's value); of a U-Net
        also `part` ("encoder", "decoder"), `deep` (how many layers of that part lie between it and the image) and `judged_up_to`
        (noise levels by which the order of layers is judged).

        Without rows if the stage activation has not run.
        """
        self._require_shown("activation")
        numbers = ("depth", "step", "at", "mean", "rms")
        table = self._joined(
            self._read("activation/activation.csv", ACTIVATION, (*RUN, "layer", *numbers), numbers)
        )
        table["part"] = table["layer"].str.split(".").str[0].map({"enc": "encoder", "dec": "decoder"})
        # the encoder begins at the image, the decoder deep inside
        inwards = table["depth"].where(table["part"] == "encoder", -table["depth"])
        table["deep"] = inwards.groupby([table["of"], table["seed"], table["part"]]).rank("dense") - 1
        return table

    @cached_property
    def peaks(self) -> pd.DataFrame:
        """At which noise level the layers of U-Nets are most active, a row for each run, seed, layer and reading: `of`, `seed`,
        `family`, `label`, `layer`, `part`, `deep`, `reading` ("mean", "rms"), `sigma`, and `sigma_judged`, the same among the noise
        levels by which the order of layers is judged. The paper's min-max normalisation of each layer moves none of them.

        Without rows if the stage activation has not run.
        """
        keys = ["of", "seed", "family", "label", "layer", "part", "deep", "reading"]
        columns = [*keys[:-1], "at", "judged_up_to"]
        unets = self.activation.dropna(subset="part").melt(columns, ["mean", "rms"], "reading")
        judged = unets[unets["at"] <= unets["judged_up_to"]]
        found = {}
        for name, rows in (("sigma", unets), ("sigma_judged", judged)):
            highest = rows.loc[rows.groupby(keys)["value"].idxmax()]
            found[name] = highest.set_index(keys)["at"]
        return pd.DataFrame(found).reset_index()

    @cached_property
    def orders(self) -> pd.DataFrame:
        """Which of two layers of a U-Net's encoder, or of its decoder, is most active at the higher noise level, a row for each run,
        seed and `first`: "deep", as GDD claims, or "shallow"; `pairs_mean`, `pairs_rms`: how many pairs of layers are so by each
        reading, over the judged noise levels. Two that are alike count half; half a pair is added to each, so that none is 0.

        Kendall's rank correlation of depth and noise level is about (deep - shallow) / (deep + shallow).

        Without rows if the stage activation has not run.
        """
        keys = ["of", "seed", "family", "label", "reading"]
        pairs = self.peaks.merge(self.peaks, on=[*keys, "part"])
        pairs = pairs[pairs["deep_x"] > pairs["deep_y"]]
        sign = np.sign(pairs["sigma_judged_x"] - pairs["sigma_judged_y"])
        pairs = pairs.assign(deep=(1 + sign) / 2, shallow=(1 - sign) / 2)
        counts = pairs.groupby(keys)[["deep", "shallow"]].sum() + 0.5
        counts = counts.reset_index().melt(keys, var_name="first", value_name="pairs")
        counts = counts.pivot(index=[*keys[:-1], "first"], columns="reading", values="pairs")
        counts = counts.reindex(columns=["mean", "rms"]).add_prefix("pairs_")
        return counts.rename_axis(columns=None).reset_index()

    @cached_property
    def relative(self) -> pd.DataFrame:
        """The distance between the images of two runs of one seed, a row each: `seed`, `first`, `second`, `distance`, `images` (of
        either side), made of which `noises` ("same" or "others"); `first_of`, `second_of` name them as `of`. Where both are the same
        run, of other noises, this is what no difference looks like, between so many images.

        Without rows if the stage relative has not run.
        """
        self._require_shown("relative")
        table = self._relative
        return table.assign(first_of=table["first"].map(self._of), second_of=table["second"].map(self._of))

    @cached_property
    def claims(self) -> pd.DataFrame:
        """What was found of each claim, a row each: `id`, `part`, `claim`, `verdict`, `effect`, `seeds`, `by_kid` (the verdict that KID
        in place of FD would give), `published`, `where`, `differs` (how the comparison is other than the paper's). Without rows if the
        stage claims has not run."""
        papers = [name for name in self.shows or () if name.startswith("claims/")]
        if not papers:
            self._require_shown("claims")
            papers = [f"claims/{path.stem}" for path in sorted(self.folder.glob("claims/*.csv"))]
        tables = [self._read(f"{paper}.csv", CLAIMS, CLAIMED) for paper in papers]
        return pd.concat(tables or [pd.DataFrame(columns=list(CLAIMS))], ignore_index=True).fillna("")

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The same of claims on seconds and memory."""
        self._require_shown("measured")
        return self._read("measured.csv", CLAIMS, CLAIMED).fillna("")

    @cached_property
    def floor(self) -> pd.DataFrame:
        """What real images score, a row for each `measure`: `test`, the held-out images against the training images; `halves`,
        training images against as many others. `n_samples` and `n_reference` are the sizes of both sets, which share no image."""
        floor = Annotated[dict[str, dict[str, float]], Field(min_length=1)]
        about = read_json(self.folder / "evaluator" / "summary.json", floor=floor)
        return pd.DataFrame(about["floor"]).rename_axis("measure").reset_index()

    @cached_property
    def trivial(self) -> dict[str, float]:
        """The distances of a model that makes the mean training image, and nothing else; none if the evaluator has not measured them."""
        path = self.folder / "evaluator" / "summary.json"
        return read_json(path).get("trivial", {}) if path.exists() else {}

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """What the study's params.yaml declares to be compared."""
        return check_comparisons(self.params)

    def compare(self, name: str) -> pd.DataFrame:
        """Return the rows of a declared comparison, a row for each side and seed of each pair.

        `pair` counts from 0; `side` is "runs" or "baseline" ("runs" alone where they stand in an order); `point` names the row in words.
        The other columns are those of the table that the comparison is over; for settings also those of their run, and what was
        measured of it: `train_seconds`, `train_seconds_min`, `train_seconds_max`, `train_memory`, and the same of `sample`.

        Raises: UserError if the study declares no such comparison; NotRunError if a run of it has no results.
        """
        if name not in self.comparisons:
            raise UserError(f"the study declares no comparison {name!r}{nearest(name, self.comparisons)}")
        comparison = self.comparisons[name]
        parts = []
        for pair, sides in enumerate(comparison.pairs):
            for side, point in sides.items():
                rows = self._rows(comparison, point)
                if rows.empty:
                    raise NotRunError(
                        f"comparisons.{name}: {self.folder} has no results of {point}; run its stages first"
                    )
                parts.append(rows.assign(pair=pair, side=side, point=str(point)))
        return _keys_first(pd.concat(parts, ignore_index=True), ["pair", "side", "point", "of", "seed"])

    def pairs(self, stage: str) -> pd.DataFrame:
        """Return the settings that the study compares with a baseline and that are of a stage's runs: the rows of `compare` of all such
        comparisons, `pair` in words ("get-m against vit-l"). Those that wait for results are left out."""
        parts = []
        for name, comparison in self.comparisons.items():
            runs = {point.run for _, point in comparison.points}
            about = comparison.table == "settings" and comparison.baseline
            if about and comparison.runs[0].run.startswith(f"{stage}/") and runs <= set(self.runs["of"]):
                rows = self.compare(name)
                words = rows.groupby("pair")["point"].unique().map(" against ".join)
                parts.append(rows.assign(pair=rows["pair"].map(words)))
        none = self._settings_of_runs.head(0).assign(pair="", side="", point="")
        return pd.concat(parts or [none], ignore_index=True).drop_duplicates(["pair", "side", "seed"])

    def reached(self, target: Target) -> pd.DataFrame:
        """After how many training images a run comes as near as a target, a row for each evaluated replicate: `of`, `run`, `seed`,
        `family`, `label`, and by either reference `images_train`, `images_test` (inf: not in its training), and
        `images_train_least`, `images_test_least` (as many; of one that does not get there, all of its training).

        The target is the mean distance of a run at its end, and its margin. Between two snapshots the logarithm of the distance is
        taken to be linear in that of the images; before the first snapshot nothing is known, so that this is the least.
        """
        name = self.score.lower()
        ends = self._headline().query("of == @target.run")
        rows = []
        for keys, curve in self.snapshots.groupby(["of", "run", "seed", "family", "label"], sort=False):
            row = dict(zip(["of", "run", "seed", "family", "label"], keys))
            for reference in ("train", "test"):
                column = f"{name}_{reference}"
                aim = (1 + target.margin) * stats.gmean(ends[column])
                images = _images_to(aim, curve.sort_values("nimg"), column)
                row |= {
                    f"images_{reference}": images,
                    f"images_{reference}_least": min(images, curve["nimg"].max()),
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def _rows(self, comparison: Comparison, point: Point) -> pd.DataFrame:
        """Return the rows of one point, a row for each seed; costs are of the first seed alone."""
        table = comparison.table
        if table == "settings":
            rows = self._settings_of_runs[self._settings_of_runs["of"] == point.run]
            return rows[rows["position"] == position(self.params, point, "comparisons")]
        rows = self.reached(comparison.target) if table == "reached" else getattr(self, table)
        rows = rows[rows["of"] == point.run]
        for column, value in point.at.items():
            rows = rows[rows[column].isna() if value is None else rows[column] == value]
        return rows

    @cached_property
    def _settings_of_runs(self) -> pd.DataFrame:
        """Return the settings with the columns of their runs, and with what was measured of these: of a training step as the run was
        trained, of a sampled batch at the setting's iterations. Seconds and memory are measured once, and repeated for every seed."""
        more = [column for column in self.runs if column not in self.settings]
        rows = self.settings.merge(self.runs[["of", "seed", *more]], on=["of", "seed"])
        if not (self._shows("cost") and (self.folder / "cost" / "cost.csv").exists()):
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
        return read_arrays(rows["folder"].iloc[0] / "iterates.npz", "images")

    def samples(self, of: str, seed: int = 0) -> np.ndarray:
        """Return the images (N, C, H, W) uint8 that a run's replicate makes of fixed noises, the same for all, at its headline setting.

        Raises: UserError if there is no such run, or its file is missing or damaged.
        """
        images = self.iterates(of, seed)["images"]  # after every iteration or step
        settings = self.settings
        first = settings[(settings["of"] == of) & (settings["seed"] == seed) & (settings["position"] == 0)]
        iterations = first["most_iterations"].iloc[0]
        return images[-1] if np.isnan(iterations) else images[int(min(iterations, len(images))) - 1]

    def summary(self, of: str, seed: int = 0) -> dict[str, Any]:
        """Return what a run's replicate has written of its training: its config, what was counted, versions and machine, inputs.

        Raises: UserError if it is missing or damaged.
        """
        path = self._trained(of, seed) / "summary.json"
        found = read_json(path, **TRAINED)
        if found["stage"] != of.partition("/")[0]:
            raise unreadable(path, f"it is of the stage {found['stage']}")
        return found

    def log(self, of: str, seed: int = 0) -> pd.DataFrame:
        """Return the log of a run's replicate, a row for each report: `nimg`, `loss`, `lr`, and the losses of an adversary.

        Raises: UserError if it is missing or damaged.
        """
        columns = ("nimg", "loss", "lr")
        least = 0 if "published" in self.summary(of, seed)["config"] else 1  # trained elsewhere
        return read_table(self._trained(of, seed) / "log.csv", columns, columns, least)

    def _evaluated(self) -> list[Path]:
        """Return what was evaluated, but for what a process left that was killed."""
        found = sorted(self.folder.glob("evaluate/*/*/metrics.json"))
        return [path for path in found if not path.parent.name.startswith(".")]

    def _shown(self) -> list[Path]:
        """Return what was evaluated of the stages that are shown; of a study without any, all of it, for the columns."""
        found = self._evaluated()
        shown = [path for path in found if self._shows(self._of.get(path.parts[-3], "").partition("/")[0])]
        return shown or found

    def _of_shown(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of runs of the stages that are shown."""
        stages = table["of"].str.split("/").str[0]
        return table[stages.map(self._shows).astype(bool)].reset_index(drop=True)

    def _shows(self, name: str) -> bool:
        """Return whether results of this name are shown."""
        return self.shows is None or name in self.shows

    def _require_shown(self, name: str) -> None:
        """Refuse to read what the notebook does not declare.

        Raises: UserError with the remedy.
        """
        if not self._shows(name):
            raise UserError(
                f"the notebook reads {name!r}, which its cell `parameters` does not list in `shows`; add it there"
            )

    def _about(self, path: Path) -> dict[str, Any]:
        """Return what metrics.json says of a replicate, which is that of its folder."""
        about, (run, seed) = read_json(path, **EVALUATED), path.parts[-3:-1]
        of = self.params["evaluate"].get(run, about).get("of")
        if (about["of"], str(about["seed"])) != (of, seed):
            raise unreadable(path, f"it is of {about['of']}, seed {about['seed']}")
        return about

    def _trained(self, of: str, seed: int) -> Path:
        return self.folder / of / ("" if of == "teacher" else str(seed))

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

    @property
    def _of(self) -> dict[str, str]:
        """The runs that the entries of `evaluate` are of, by their names."""
        return {name: entry["of"] for name, entry in self.params["evaluate"].items()}

    @cached_property
    def _relative(self) -> pd.DataFrame:
        if not self._shows("relative"):
            return pd.DataFrame(columns=list(RELATIVE))
        return self._read("relative/relative.csv", RELATIVE, RELATIVE[:4], ("seed", "distance"))

    def _read(
        self, file: str, columns: tuple[str, ...], needed: tuple[str, ...], numbers: tuple[str, ...] = ()
    ) -> pd.DataFrame:
        """Return a table that a stage wrote, with these columns even where it had nothing to write there but for those that are
        `needed`; one without rows if the stage has not run."""
        path = self.folder / file
        least = 1 if numbers else 0  # of what is measured there is something
        table = (
            read_table(path, needed, numbers, least) if path.exists() else pd.DataFrame(columns=list(columns))
        )
        return table.reindex(columns=list(dict.fromkeys([*table, *columns])))

    def _from_first(self) -> pd.DataFrame:
        """Return for the runs of `relative` and their seeds the distances between their images and those of the first."""
        table = self._relative
        table = table[table["first"].isin(table["first"].head(1))]
        table = table.assign(of=table["second"].map(self._of), noises=table["noises"].fillna("same"))
        by_noises = table.pivot(index=["of", "seed"], columns="noises", values="distance")
        names = {"same": "relative", "others": "relative_others"}
        return by_noises.reindex(columns=list(names)).rename(columns=names).reset_index()

    def _teacher_calls(self, summary: dict[str, Any]) -> float:
        """Return how often the teacher was evaluated for a training: once for all in the sampling of its pairs, or for each image
        as often as the form of its consistency loss takes, or else as its stage does; nan where it had no teacher or was trained
        elsewhere. The teacher in a chain is the student before."""
        config = summary["config"]
        if "published" in config:
            return math.nan
        if "pairs" in config:
            sampler = parse(Sampler, self.params["pairs"]["sampler"], "pairs.sampler")
            return float(config["pairs"] * sampler.nfe)
        loss = config.get("consistency") or config  # beside the loss of a GAN, or the only one
        calls = CONSISTENCY_CALLS[loss["form"]] if "form" in loss else STAGES[summary["stage"]].teacher_calls
        return float(calls * _seen(summary))

    def _joined(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return a table with the labels of its families, what a row is of first."""
        labels = {name: family(name).label for name in table["family"].unique()}
        table = table.assign(label=table["family"].map(labels))
        return _keys_first(table, ["of", "seed", "family", "label"])


def results(folder: Path | str = "results", shows: Iterable[str] | None = None) -> Results:
    """Return a study's results folder as tidy tables, all of it or what a notebook `shows` (`Results`).

    Raises: UserError if it holds no evaluated run, or `shows` names what no stage writes.
    """
    if shows is not None:
        shows = tuple(shows)
        refuse_unknown(shows, "shows")
    found = Results(Path(folder), shows)
    if (shows is None or {*shows} & {*GENERATORS}) and not found._evaluated():
        raise UserError(f"{folder} holds no evaluated run; run `dvc repro`, or give another results folder")
    return found


def _sweep(path: Path, about: Mapping[str, Any]) -> pd.DataFrame:
    """Return the settings at which a replicate was evaluated; `path` is that of its metrics, `about` their content, which says how
    many settings there are, unless it was written before it did."""
    return _scored(path.with_name("sweep.csv"), ("nfe", "flops"), about.get("settings") or 1)


def _scored(path: Path, numbers: tuple[str, ...], least: int) -> pd.DataFrame:
    """Return a table with the columns `numbers` and scores; one without rows need not have columns.

    Raises: UserError if it is missing or damaged, or has fewer than `least` rows.
    """
    table = read_table(path, (), [*numbers, *MEASURED], least)
    if len(table) and not (table.columns.intersection(DISTANCES).size and {*numbers} <= {*table}):
        raise unreadable(path, "it has no scores")
    return table


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


def _before(summary: Mapping[str, Any]) -> int:
    """Return the training images that the students before this one saw, in a chain of which each teaches the next."""
    return summary.get("nimg_before") or 0


def _seen(summary: Mapping[str, Any]) -> int:
    """Return the training images that it took to make a run."""
    return summary["nimg"] + _before(summary)


def _images_to(aim: float, curve: pd.DataFrame, column: str) -> float:
    """Return after how many images a curve first comes down to a distance; inf if it never does."""
    distance, nimg = curve[column].to_numpy(), curve["nimg"].to_numpy(float)
    near = np.flatnonzero(distance <= aim)
    if not len(near):
        return np.inf
    if near[0] == 0:
        return nimg[0]
    after, before = near[0], near[0] - 1
    return float(
        np.exp(np.interp(np.log(aim), np.log(distance[[after, before]]), np.log(nimg[[after, before]])))
    )


def _residual_ratios(path: Path, settings: int) -> list[float]:
    """Return for each setting of a chain the geometric mean of the last residuals in the less noisy half of its timesteps over that in
    the noisier half; nan where there is no fixed point, or too few steps. The first step, which has nothing to reuse, is left out."""
    arrays = read_arrays(path)
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
