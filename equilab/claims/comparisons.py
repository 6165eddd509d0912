"""What a study compares: the params section `comparisons`, read and checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from equilab.core.config import Params, Scalar, UserError, failures, mapping, nearest, parse
from equilab.core.settings import setting_columns
from equilab.core.stages import GENERATORS
from equilab.graph import STAGES

COSTS = ("what", "gradient", "most_iterations")  # columns of costs that single out a row of a run


class Point(Params):
    """One side of a pair: a trained run at its headline setting, or `at` another of its rows in the table."""

    run: str  # as `of` in the tables: teacher, or STAGE/RUN
    at: dict[str, Scalar] = Field(default_factory=dict)

    def __str__(self) -> str:
        """The run's name, and what singles out the row: fpdm (ddim, steps 4, no reuse)."""
        words = [_word(key.replace("_", " "), value) for key, value in self.at.items()]
        name = self.run.rpartition("/")[2]
        return f"{name} ({', '.join(words)})" if words else name


def _word(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return key if value else f"no {key}"
    return value if isinstance(value, str) else f"{key} {value}"


def _point(value: Any) -> Any:
    return {"run": value} if isinstance(value, str) else value


Points = tuple[Annotated[Point, BeforeValidator(_point)], ...]


class Target(Params):
    """A distance that runs are to come down to: the one that another run ends at, and relatively so much more."""

    run: str
    margin: Annotated[float, Field(ge=0)]


class Comparison(Params):
    """An entry of the section: `runs` against `baseline`, pair by pair; without a baseline, `runs` stand in a claimed order."""

    runs: Annotated[Points, Field(min_length=1)]
    baseline: Points = ()  # as many as runs, or one for all of them
    # whose rows are compared
    table: Literal["settings", "snapshots", "costs", "orders", "reached"] = "settings"
    target: Target | None = None  # of reached
    differs: str = ""  # how it is other than the paper's, in words that stand beside the verdict

    @model_validator(mode="after")
    def _paired(self) -> Comparison:
        if len(self.baseline) not in (0, 1, len(self.runs)):
            raise ValueError(
                f"baseline must name one point, or {len(self.runs)} as runs does, not {len(self.baseline)}"
            )
        if not self.baseline and len(self.runs) < 2:
            raise ValueError("give a baseline, or two runs or more in their order")
        if (self.table == "reached") != (self.target is not None):
            raise ValueError("target belongs to the table reached, and to no other; give both or neither")
        return self

    @property
    def pairs(self) -> list[dict[str, Point]]:
        """The two sides of each pair, "runs" and "baseline"; of an order only "runs"."""
        if not self.baseline:
            return [{"runs": point} for point in self.runs]
        baseline = self.baseline if len(self.baseline) > 1 else self.baseline * len(self.runs)
        return [{"runs": one, "baseline": other} for one, other in zip(self.runs, baseline)]

    @property
    def points(self) -> Iterator[tuple[str, Point]]:
        """Every point with its place within the entry."""
        for side in ("runs", "baseline"):
            for k, point in enumerate(getattr(self, side)):
                yield f"{side}[{k}]", point


def check_comparisons(sections: Mapping[str, Any], where: str = "") -> dict[str, Comparison]:
    """Return the comparisons that the sections of a params file declare: each names rows that the study will have.

    Raises: UserError with a sentence for each mistake, each with the path of its key, `where` before it: a run that is not
        trained or not evaluated, a column or a setting that it does not have, or one that singles out none of its settings,
        or several.
    """
    declared, wrong = {}, []
    for name, value in mapping(sections.get("comparisons", {}), f"{where}comparisons").items():
        path = f"{where}comparisons.{name}"
        try:
            declared[name] = parse(Comparison, value, path)
        except UserError as error:
            wrong.append(str(error))
            continue
        table = declared[name].table
        wrong += failures(
            partial(_check, sections, table, point, f"{path}.{place}")
            for place, point in declared[name].points
        )
        if target := declared[name].target:
            wrong += failures(
                [partial(_check, sections, "settings", Point(run=target.run), f"{path}.target")]
            )
    if wrong:
        raise UserError("\n".join(wrong))
    return declared


def _check(sections: Mapping[str, Any], table: str, point: Point, path: str) -> None:
    trained = ["teacher"] if sections.get("teacher") is not None else []
    for stage in GENERATORS[1:]:
        trained += [f"{stage}/{run}" for run in sections.get(stage) or {}]
    if point.run not in trained:
        raise UserError(f"{path}: the study trains no {point.run!r}{nearest(point.run, trained)}")
    if table == "settings":
        position(sections, point, path)
    if table == "snapshots":
        _check_snapshot(sections, point, path)
    if table == "costs":
        _check_cost(sections, point, path)
    if table == "orders":
        _check_order(sections, point, path)
    if table == "reached":
        _check_reached(sections, point, path)


def position(sections: Mapping[str, Any], point: Point, path: str) -> int:
    """Return which setting of its run a point is, in the order of the section `evaluate` (0: the headline).

    Raises: UserError naming `path` if the run is not evaluated once, or not exactly one of its settings is as the point says.
    """
    entries = [name for name, entry in sections.get("evaluate", {}).items() if entry.get("of") == point.run]
    if len(entries) != 1:
        found = f"evaluated twice, as {' and '.join(entries)}" if entries else "not evaluated"
        raise UserError(f"{path}: {point.run} is {found}; give it one entry in evaluate")
    if not point.at:
        return 0
    settings = _settings(sections["evaluate"][entries[0]])
    known = dict.fromkeys(key for setting in settings for key in setting)
    for key in point.at:
        if key not in known:
            raise UserError(
                f"{path}.at.{key}: no setting of {point.run} has such a column{nearest(key, known)}"
            )
    alike = [
        k
        for k, setting in enumerate(settings)
        if all(setting.get(key) == each for key, each in point.at.items())
    ]
    if len(alike) != 1:
        found = f"{len(alike)} settings" if alike else "no setting"
        remedy = "add what tells them apart" if alike else "change it, or add the setting to evaluate"
        raise UserError(f"{path}.at: {found} of evaluate.{entries[0]} has {_words(point.at)}; {remedy}")
    return alike[0]


def _settings(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of an entry of `evaluate`, each by the columns that it has in the table `settings`."""
    return [
        setting_columns(setting) for key in ("sampler", "solver", "chain") for setting in entry.get(key, ())
    ] or [{}]


def _optimisation(sections: Mapping[str, Any], of: str, path: str) -> Mapping[str, Any]:
    stage, _, run = of.partition("/")
    entry = sections[stage][run] if run else sections[stage]
    if "optimisation" not in entry:
        raise UserError(
            f"{path}: the weights of {of} are published ones, without snapshots; name a run that is trained here"
        )
    return entry["optimisation"]


def _check_snapshot(sections: Mapping[str, Any], point: Point, path: str) -> None:
    if set(point.at) != {"nimg"}:
        raise UserError(f"{path}.at: say which snapshot, by nimg alone")
    if STAGES[point.run.partition("/")[0]].chained:
        raise UserError(
            f"{path}: snapshots of {point.run} are counted from the first student of its chain; compare its end"
        )
    optimisation = _optimisation(sections, point.run, path)
    kept = [*optimisation["snapshots"], optimisation["nimg"]]
    if point.at["nimg"] not in kept:
        raise UserError(
            f"{path}.at.nimg: {point.run} keeps no snapshot of {point.at['nimg']} images; it has {kept}"
        )


def _check_reached(sections: Mapping[str, Any], point: Point, path: str) -> None:
    position(sections, point, path)
    optimisation = _optimisation(sections, point.run, path)
    if point.at or not optimisation["snapshots"]:
        raise UserError(
            f"{path}: name a run with snapshots, and no setting: it is followed along its training"
        )
    if optimisation["decay"] != "none":
        raise UserError(
            f"{path}: the learning rate of {point.run} decays, so that it comes near its end only there; name a run with "
            "decay: none"
        )


def _check_cost(sections: Mapping[str, Any], point: Point, path: str) -> None:
    measured = sections.get("cost", {}).get("runs", ())
    if point.run not in measured:
        raise UserError(f"{path}: cost.runs does not measure {point.run}; add it there")
    for key in point.at:
        if key not in COSTS:
            raise UserError(f"{path}.at.{key}: costs are told apart by other columns{nearest(key, COSTS)}")


def _check_order(sections: Mapping[str, Any], point: Point, path: str) -> None:
    looked_at = sections.get("activation", {}).get("runs", ())
    if point.run not in looked_at:
        raise UserError(f"{path}: activation.runs does not look at {point.run}; add it there")
    if point.at not in ({"first": "deep"}, {"first": "shallow"}):
        raise UserError(
            f"{path}.at: say which of two layers is active at the higher noise level, first: deep or shallow"
        )


def _words(at: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{key} {value}" for key, value in at.items())
