"""What memory must not do: grow with the number of pairs, or of images scored; and what a fixed point saves of it."""

import os
import shutil
import tracemalloc
from pathlib import Path

import published_sizes
import pytest
import smoke
import torch

from equilab import __main__
from equilab.core import rng
from equilab.data.pairset import PairSet
from equilab.metrics import fidelity
from equilab.metrics.measuring import peak_memory
from equilab.models import dit, fpdm
from equilab.solvers import Gradient, Solver, equilibrium

CPU = torch.device("cpu")


def memory(call):
    """Return the most bytes that a call holds: of tensors, and of all else in Python."""
    held = []

    def traced():
        tracemalloc.start()
        call()
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    return peak_memory(traced, CPU) + held[0]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Runs a stage of the smoke study with so many pairs; what it reads is there."""
    folder, before = tmp_path_factory.mktemp("study"), Path.cwd()

    def run(name, *which, pairs=200):
        smoke.write_study(folder, {"pairs.count": pairs, "distill.get.pairs": pairs})
        assert __main__.main([name, *which, "--params", str(folder / "params.yaml")]) == 0

    for name, *which in (["data"], ["evaluator"], ["teacher"], ["pairs"], ["distill", "get", "--seed", "0"]):
        run(name, *which)  # the first time also for what is imported on the way
    yield run
    os.chdir(before)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pairs(stage):
    def most(count):
        for folder in ("results/pairs", ".equilab"):  # pairs that are there are not made again
            shutil.rmtree(folder)
        made = memory(lambda: stage("pairs", pairs=count))
        trained = memory(lambda: stage("distill", "get", "--seed", "0", pairs=count))
        pairs, draw = PairSet(Path("results/pairs")), rng.generator(0, "which pairs")
        read = memory(lambda: pairs.read(draw.integers(count, size=100)))
        return made, trained, read

    for few, many in zip(most(200), most(680)):
        assert many - few < 480 * 64  # bytes of the images of the other pairs, whose order alone is held


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_scored_images(stage, monkeypatch):
    monkeypatch.setattr(fidelity, "COMPARED", 500)  # of which features are kept
    evaluator, data, cache = (Path("results", name) for name in ("evaluator", "data", "cache"))
    scorer = fidelity.Scorer(evaluator, data, cache, CPU)
    batch = scorer.train[:200]
    few, many = (memory(lambda: scorer.scores(batch for _ in range(count))) for count in (10, 200))
    assert many < 1.05 * few


@pytest.mark.slow
def test_training_a_fixed_point_takes_less_memory_than_as_many_layers():
    """24 iterations, half of them with gradient, as FPDM's training draws at most, against the 28 layers of a DiT."""
    image, sizes = (4, 16, 16), {"width": 64, "heads": 1}
    explicit = dit.DiT(image, 0, **{**dit.SIZES["DiT-S/2"], **sizes, "depth": 28})
    implicit = fpdm.FPDM(image, 0, **{**published_sizes.FPDM["FPDM-S/2"], **sizes})
    x, t = torch.randn(8, *image), torch.full((8,), 500)
    solver = Solver("iterate", 1, 0.0, "last", measure=False)

    def solve(f, init):
        return equilibrium(f, init, solver, Gradient("s_jfb"), (12, 12))

    few = peak_memory(lambda: implicit(x, t, None, None, solve)[0].square().mean().backward(), CPU)
    many = peak_memory(lambda: explicit(x, t, None).square().mean().backward(), CPU)
    assert few < 0.7 * many
