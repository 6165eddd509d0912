"""What memory must not do: grow with the number of pairs, or of images scored; and what a fixed point saves of it."""

import os
import shutil
import subprocess
import sys
import timeit
import tracemalloc
from pathlib import Path

import authors
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
from equilab.models.family import family
from equilab.models.unet import UNet
from equilab.published.loading import load_network
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


READ = """
import sys
from pathlib import Path
from equilab.published.loading import load_network

def most():  # KiB that the process has held, of Linux; that of getrusage begins with the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = most()
loaded = load_network(sys.argv[1], sys.argv[2], {"heads": 12} if sys.argv[1] == "dit" else {})
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it in /proc")
def test_reading_a_published_file_takes_less_than_twice_its_size(tmp_path):
    sizes = {"width": 768, "depth": 5, "heads": 12, "patch": 2, "expansion": 4, "learned_variance": True}
    transformer = dit.DiT((4, 32, 32), 10, **sizes)
    sizes = {"width": 192, "multipliers": [2, 2], "blocks": 3, "attention": [16], "head_channels": 0}
    unet = UNet((3, 32, 32), 0, architecture="ddpmpp", dropout=0.0, augment=9, **sizes)
    for name, net, path in (("dit", transformer, tmp_path / "dit.pt"), ("edm", unet, tmp_path / "edm.pkl")):
        state = net.state_dict()
        weights = {theirs: state[ours] for theirs, ours in family(name).published.keys(net).items()}
        if name == "dit":
            torch.save({"ema": authors.state_dict(weights)}, path)
        else:
            authors.nvidia(path, weights, "EDMPrecond", sigma_data=0.5)
        read = subprocess.run([sys.executable, "-c", READ, name, path], capture_output=True, text=True)
        assert read.returncode == 0, read.stderr
        assert 0.9 < 1024 * int(read.stdout) / path.stat().st_size < 1.5


@pytest.mark.slow
def test_reading_a_published_file_takes_no_longer_than_torch(tmp_path):
    """What `load_network` does, by hand: read the file by torch, build the network, put the weights into it."""
    sizes = {"width": 768, "depth": 5, "heads": 12, "patch": 2, "expansion": 4, "learned_variance": True}
    net, path = dit.DiT((4, 32, 32), 10, **sizes), tmp_path / "dit.pt"
    state, keys = net.state_dict(), family("dit").published.keys(net)
    torch.save({"ema": authors.state_dict({theirs: state[ours] for theirs, ours in keys.items()})}, path)

    def by_torch():
        weights = torch.load(path)["ema"]
        built = dit.DiT((4, 32, 32), 10, **sizes)
        built.load_state_dict({ours: weights[theirs] for theirs, ours in keys.items()})

    def seconds(read):
        return min(timeit.repeat(read, number=1, repeat=5))

    assert seconds(lambda: load_network("dit", path, {"heads": 12})) < seconds(by_torch)
