"""How a trained run is sampled: the settings that params list, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WrapValidator, model_validator

from equilab.core.config import Params, UserError, did_you_mean, parse, plain, shown
from equilab.diffusion.settings import Sampler
from equilab.solvers import Solver
from equilab.solvers.solver import METHODS

Method = Literal[METHODS]  # of solvers
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Tolerance = Annotated[float, Field(ge=0, le=1)]  # relative residual at which a sample stops; 0: never
Memory = Annotated[int, Field(ge=2, le=1000)]  # of Anderson: states combined
Mixing = Annotated[float, Field(gt=0, le=1)]  # of Anderson: weight of the residual
BUDGETS = ("constant", "increasing", "decreasing", "adaptive")


def _budget(value: Any, read: Any) -> Any:
    """Return a budget as `read` gives it; of none, one sentence."""
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            f"{shown(value)} is no budget; give {', '.join(BUDGETS)}, or a list of the iterations of each step"
            f"{did_you_mean(value, BUDGETS)}"
        ) from None


# how iterations are spread over steps, or those of each step, the noisiest first
Spread = Annotated[Literal[BUDGETS] | tuple[Count, ...], WrapValidator(_budget)]

# what an option that changes the method brings along unless it is given too (docs/checkpoints.md)
ANDERSON = {"memory": 5, "mixing": 1.0}
WITHOUT_ANDERSON = {"memory": None, "mixing": None}
ETA = {"ddim": 0.0, "ddpm": None}
GUIDED = "first_three"  # channels, as published


class Solve(Params):
    """How an implicit generator of one step is solved at test time."""

    method: Method
    iterations: Count  # at most
    tolerance: Tolerance
    pick: Literal["last", "lowest"]  # iterate that is returned: the last, or that of lowest absolute residual
    memory: Memory | None
    mixing: Mixing | None
    init: Literal["zeros", "noise"]

    @model_validator(mode="after")
    def _is_a_solver(self):
        self.solver()
        return self

    def solver(self, record: bool = False) -> Solver:
        """Return the solver; with `record` it keeps all iterates."""
        return Solver(
            self.method,
            self.iterations,
            self.tolerance,
            self.pick,
            record=record,
            memory=self.memory,
            mixing=self.mixing,
        )


def iterated(count: int) -> Solve:
    """Return the setting that applies the map so often, from zeros, and takes the last state."""
    return Solve(
        method="iterate", iterations=count, tolerance=0.0, pick="last", memory=None, mixing=None, init="zeros"
    )


class Guidance(Params):
    """Classifier-free guidance: away from no class, towards the label, `scale` times."""

    scale: Annotated[float, Field(ge=0, le=1000)]
    channels: Literal["all", "first_three"]  # of the image; the first three as published


class FixedPointAlongChain(Params):
    """How the fixed points along a chain are solved, and what they may cost."""

    blocks: Count  # of a chain without guidance (which takes two): over all steps, explicit layers included
    budget: Spread
    reuse: bool  # each step starts from the solution of the one before
    method: Method
    tolerance: Tolerance
    memory: Memory | None
    mixing: Mixing | None

    @model_validator(mode="after")
    def _is_a_solver(self):
        self.solver()
        if self.budget == "adaptive" and self.tolerance:
            raise ValueError(
                f"tolerance is {self.tolerance}; set it to 0, as an adaptive budget sets that of each step"
            )
        return self

    def solver(self) -> Solver:
        """Return the solver; its iterations are those that the budget gives a step."""
        return Solver(self.method, 1, self.tolerance, "last", memory=self.memory, mixing=self.mixing)


class ChainSampler(Params):
    """How a denoiser of discrete timesteps is sampled: along evenly spaced timesteps, noisiest first."""

    method: Literal["ddpm", "ddim"]
    steps: Count
    eta: Annotated[float, Field(ge=0, le=1)] | None  # of ddim: 0 adds no fresh noise, 1 as much as ddpm
    clamp: bool  # hold predicted images in -1..1
    guidance: Guidance | None
    fixed_point: FixedPointAlongChain | None  # null for explicit networks

    @model_validator(mode="after")
    def _eta_is_of_ddim(self):
        if (self.method == "ddim") != (self.eta is not None):
            raise ValueError(f"eta is {self.eta}; give 0..1 for ddim and null for ddpm")
        return self

    @property
    def nfe(self) -> int:
        """Predictions for an image: one each step, with guidance two."""
        return self.steps * (2 if self.guidance else 1)


Setting = Sampler | Solve | ChainSampler

# what is within a group of a setting: an option's name, as tables have it, and the group and the key that it is of
GROUPED = {
    "guidance_scale": ("guidance", "scale"),
    "guidance_channels": ("guidance", "channels"),
    "solver": ("fixed_point", "method"),
    **{key: ("fixed_point", key) for key in FixedPointAlongChain.model_fields if key != "method"},
}


def options_of(kind: type[Setting], without: tuple[str, ...] = ()) -> list[str]:
    """Return the names of what can be set of a kind of setting, one by one, but for the groups `without`."""
    groups = {group for group, _ in GROUPED.values()}
    found = [name for name in kind.model_fields if name not in groups]
    for name, (group, _) in GROUPED.items():
        if group in kind.model_fields and group not in without:
            found.append(name)
    return found


def changed(setting: Setting, options: Mapping[str, Any]) -> Setting:
    """Return a setting with other values of some of its `options_of`, and with those that another method needs.

    Raises: UserError with a sentence for each value that cannot be.
    """
    values = plain(setting)
    for name, value in {**_brought(setting, options), **options}.items():
        if name in values:
            values[name] = value
        else:
            group, key = GROUPED[name]
            values[group] = {**(values[group] or {}), key: value}
    try:
        return parse(type(setting), values, "option")
    except UserError as error:
        sentences = str(error)
    for name, (group, key) in GROUPED.items():
        sentences = sentences.replace(f"option.{group}.{key}:", f"option.{name}:")
    sentences = sentences.replace("option.fixed_point:", "option.solver:")
    raise UserError(sentences.replace("null", "None"))  # options are given in Python


def _brought(setting: Setting, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that options bring along: of another method, and of guidance where there was none."""
    brought = {}
    if isinstance(setting, ChainSampler):
        if options.get("method", setting.method) != setting.method:
            brought["eta"] = ETA.get(str(options["method"]))
        if "guidance_scale" in options and setting.guidance is None:
            brought["guidance_channels"] = GUIDED
    solved, name = setting, "method"
    if isinstance(setting, ChainSampler):
        solved, name = setting.fixed_point, "solver"
    if isinstance(solved, (Solve, FixedPointAlongChain)) and name in options:
        if not str(options[name]).endswith("anderson"):
            brought |= WITHOUT_ANDERSON
        elif solved.memory is None:
            brought |= ANDERSON
    return brought
