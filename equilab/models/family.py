"""A family of models: said once how it is named, built, trained, sampled, counted, drawn, and read from the authors' weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from equilab.core.config import UserError, choice, nearest
from equilab.models.published_keys import Published
from equilab.models.registry import FAMILIES

Stage = Literal["teacher", "distill", "diffusion", "gan", "consistency", "progressive"]


@dataclass(frozen=True)
class Family:
    """What the package knows of a family of models.

    The stage that trains its runs says how they are trained and sampled: `teacher`, a denoiser of noise levels followed by
    an ODE solver; `distill`, a generator of one step; `diffusion`, a denoiser of timesteps followed along a chain; `gan`,
    `consistency` and `progressive`, the teacher's network as a generator of few steps.
    """

    name: str  # in the registry, in tables and in claims
    label: str  # in figures and in prose
    colour: str
    marker: str
    stage: Stage
    kind: str  # `network.kind` in params
    network: type[nn.Module]  # built of what the data determines and, by keyword alone, of what params give
    implicit: bool  # solves for a fixed point, at a cost that is linear in its iterations
    layered: bool  # has layers whose activity is measured along noise levels, timesteps or iterations
    published: Published | None  # how it is read from the authors' weights; None: there are none


def family(name: str) -> Family:
    """Return a family by its name.

    Raises: UserError naming the nearest, if there is none of that name.
    """
    if name not in FAMILIES:
        raise UserError(f"unknown family {name!r}{nearest(name, FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or "FAMILY")


def families(stage: str) -> dict[str, Family]:
    """Return the families whose runs a stage trains, by their kind in params; none where it trains no generator."""
    found = (family(name) for name in FAMILIES)
    return {each.kind: each for each in found if each.stage == stage}


def network(stage: Stage) -> Any:
    """Return the type of a field of a stage's params that names a network of one of its families, with its sizes."""

    def networks() -> dict[str, type[nn.Module]]:
        return {kind: each.network for kind, each in families(stage).items()}

    return choice(networks, "a new family is entered in equilab/models/registry.py")
