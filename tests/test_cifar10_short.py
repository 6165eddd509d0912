"""The study cifar10-short, every stage with its networks as they are: a few batches from a zip of images to the report."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from pictures import encoded, write_zip
from smoke import ROOT

from equilab.core import like

pytestmark = pytest.mark.slow

BATCH = 16
VARIANTS = ("get-s", "get-m-normalised", "vit-s", "vit-l", "dit-own")
# everything, and the memory of the largest process that it took, in KiB: jobs are no forks, whose memory is not told to this one
RUN = """
import resource
from equilab.__main__ import main
from equilab.cluster import worker
worker.CAN_FORK = False
assert main(["check"]) == 0
assert main(["submit", "--jobs", "2"]) == 0
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
LARGEST = 3 * 2**30  # bytes of memory that a stage may take at this batch


def few_images(section):
    """Train on two batches, in halves."""
    settings = section["optimisation"]
    settings |= {"nimg": 2 * BATCH, "batch": BATCH, "micro_batch": BATCH // 2, "report_nimg": BATCH}
    settings |= {"decay_start_nimg": 0, "ema_half_life_nimg": BATCH}
    settings |= {"warmup_nimg": min(settings["warmup_nimg"], BATCH)}
    settings["precision"] = "fp32"  # bf16 is slow on CPUs that do not know it
    settings["snapshots"] = [BATCH, 2 * BATCH] if settings["snapshots"] else []


def few_settings(entry):
    """Evaluate at the headline and one other setting, chains of them short, with four blocks a step of FPDM as they are."""
    entry |= {"batch": BATCH, "precision": "fp32"}
    for kind in ("sampler", "solver", "chain"):
        entry[kind] = entry[kind][:2]
    for steps, chain in zip((4, 2), entry["chain"]):
        chain["steps"] = steps
        if chain["fixed_point"]:
            chain["fixed_point"]["blocks"] = 4 * steps


def leave_out(params, names):
    """Take runs out of a study, those that differ from others in size or form alone."""
    for stage in ("distill", "diffusion", "evaluate"):
        params[stage] = {name: entry for name, entry in params[stage].items() if name not in names}
    params["cost"]["runs"] = [of for of in params["cost"]["runs"] if of.rpartition("/")[2] not in names]


def compares_headlines(comparison, left_out):
    """Return whether a comparison is of the first settings of runs that the study has."""
    points = comparison["runs"] + comparison.get("baseline", [])
    return all(isinstance(point, str) and point.rpartition("/")[2] not in left_out for point in points)


def short_params():
    """Return the params of cifar10-short with its networks, and as little work as its stages allow."""
    params = like.read(ROOT / "studies/cifar10-short/params.yaml")
    params["study"] |= {"root": str(ROOT), "threads": 2, "run_threads": 1, "device": "cpu"}
    for name in ("evaluator", "teacher", "features"):
        few_images(params[name])
    for stage in ("distill", "diffusion", "gan", "consistency"):
        for run in params[stage].values():
            few_images(run)
    for run in params["distill"].values():
        run["pairs"] = 4
    for run in params["gan"].values():
        run["r1"] |= {"interval": 2, "samples": BATCH // 2}
    params["pairs"] |= {"count": 4, "held_out": 4, "shard": 4, "batch": 4, "precision": "fp32"}
    params["evaluator"]["samples"] = 10
    for entry in params["evaluate"].values():
        few_settings(entry)
    params["activation"] |= {"samples": 4, "batch": 4, "timesteps": 4}
    params["activation"]["levels"]["steps"] = 4
    params["cost"] |= {"batch": 1, "warmup": 1, "repeats": 1, "iterations": [6]}
    leave_out(params, VARIANTS)
    declared = params["comparisons"].items()
    params["comparisons"] = {name: each for name, each in declared if compares_headlines(each, VARIANTS)}
    return params


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study's folder, current, with two zips of noise in the EDM format."""
    drawn = np.random.default_rng(0)
    for name, count in (("train", 120), ("test", 40)):
        pixels = drawn.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        files = {f"00000/img{k:08d}.png": encoded(image) for k, image in enumerate(pixels)}
        labels = [[file, k % 10] for k, file in enumerate(files)]
        write_zip(tmp_path / f"cifar10-{name}.zip", {**files, "dataset.json": json.dumps({"labels": labels})})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(short_params(), sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_of_it_runs_at_its_real_sizes(study):
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "claims.md",
        "measured.md",
        "report/index.html",
        "cost/cost.csv",
        "activation/activation.csv",
    ):
        assert (study / "results" / name).stat().st_size > 0, name
    for notebook in yaml.safe_load((study / "params.yaml").read_text())["notebook"]:
        assert list((study / "results/notebook" / notebook).glob("*.png")), notebook
    memory = int(done.stdout.splitlines()[-1]) * 1024
    assert memory < LARGEST, f"the largest process took {memory / 2**20:.0f} MiB"
