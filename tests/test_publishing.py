"""Stages replace their results all at once, or leave them as they were; what they cannot do they say before they begin."""

from pathlib import Path

import numpy as np
import pytest
import torch
from smoke import called, refused, write_study

from equilab.core import machine
from equilab.core.config import UserError, spec
from equilab.core.files import write, write_array
from equilab.data import shards
from equilab.models.classifier import CLASSIFIERS
from equilab.study import Replicate, job_of, open_study
from equilab.training import evaluator, loop, trainer

SHORT = {f"evaluator.optimisation.{key}": 32 for key in ("nimg", "batch", "micro_batch", "report_nimg")}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The smoke study with its data, and results of an evaluator of other days; the current folder."""
    monkeypatch.chdir(write_study(tmp_path, SHORT))
    called("data")
    for name in ("weights.safetensors", "log.csv", "summary.json", "note of the user"):
        write(Path("results/evaluator", name), "old")
    return tmp_path


def content():
    """Return all results, and what is unfinished beside them."""
    return {path.as_posix(): path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}


def test_damaged_held_out_images_are_told_before_the_training(study, capsys):
    path = Path("results/data/test_images.npy")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    before = content()
    assert "test_images.npy is damaged" in refused(capsys, "evaluator")
    assert content() == before and not list(Path(".equilab/scratch").glob("*"))


def test_an_evaluator_that_cannot_score_leaves_the_former_one_and_does_not_train_again(
    study, capsys, monkeypatch
):
    def failing(*_):
        raise UserError("no scores today")

    before = content()
    with monkeypatch.context() as patched:
        patched.setattr(evaluator, "Scorer", failing)
        assert "no scores today" in refused(capsys, "evaluator")
    assert content() == before
    monkeypatch.setattr(loop, "learning_rate", None)  # which every update calls, and nothing now
    called("evaluator")
    after = content()
    assert after.keys() == before.keys() and after["results/evaluator/note of the user"] == b"old"
    assert b"floor" in after["results/evaluator/summary.json"]
    assert not list(Path(".equilab/scratch").glob("*"))


def test_a_folder_in_the_way_of_a_result_is_told_before_the_training(study, capsys):
    Path("results/evaluator/log.csv").unlink()
    Path("results/evaluator/log.csv").mkdir()
    before = content()
    assert "results/evaluator/log.csv is a folder" in refused(capsys, "evaluator")
    assert content() == before


def test_all_processes_go_by_what_the_first_one_sees(tmp_path, monkeypatch, study):
    """The second of two, which came late: a shard is there that the first has just made, one is not there that was."""
    seen = []

    def first_sees(values):
        seen.append(values.tolist())
        return torch.tensor([1, 0, 0, 0])

    for name, value in {"rank": 1, "world": 2}.items():
        monkeypatch.setattr(shards, name, lambda value=value: value)
    monkeypatch.setattr(shards, "total", first_sees)
    monkeypatch.setattr(shards, "barrier", lambda: None)
    folder = tmp_path / "shards"
    late = folder / "rows-0000000002.npy"
    write(late.with_suffix(".sha256"), write_array(late, np.zeros(2)))

    job = job_of(open_study(Path("params.yaml")), "pairs", Replicate())
    shards.make(job, folder, "rows", lambda indices: indices, count=8, shard=2, batch=2, row_bytes=8)
    assert {path.name for path in folder.glob("*.npy")} == {late.name, "rows-0000000004.npy"}
    assert seen == [[0, 0, 0, 0]]  # it has no say


def test_a_network_larger_than_the_machine_is_refused_before_it_is_built(monkeypatch):
    network = spec(
        CLASSIFIERS, {"kind": "classifier", "width": 16384, "features": 16384}, "evaluator.network"
    )
    monkeypatch.setattr(type(network), "build", lambda self, *given: torch.nn.Linear(8, 2**28, device="meta"))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 2**16)
    with pytest.raises(
        UserError, match="evaluator.network: a network of 2,415,919,104 parameters takes 9 GiB"
    ):
        trainer.build(network, 0, "weights", (1, 8, 8), 10)
