"""Fixed points z = f(z) of batches of states: how they are found, what is recorded, how they are differentiated."""

from __future__ import annotations

from equilab.solvers.gradients import Gradient, equilibrium
from equilab.solvers.record import Solution
from equilab.solvers.solver import Solver

__all__ = ["Gradient", "Solution", "Solver", "equilibrium"]
