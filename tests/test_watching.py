"""A training that is watched: what is shown, and that its bytes are the same; its curve in a notebook."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import seaborn
from filelock import FileLock
from smoke import called, refused, write_study
from test_killed import content

import equilab
from equilab import watching
from equilab.core.config import UserError


@pytest.fixture(scope="module")
def trained(study_of_pairs):
    """The same study with a ViT, trained without being watched."""
    before = Path.cwd()
    try:
        called("distill", "vit", "--params", str(study_of_pairs / "params.yaml"))
    finally:
        os.chdir(before)
    return study_of_pairs


@pytest.fixture
def pairs(study_of_pairs, tmp_path, monkeypatch):
    """A study of the same pairs in the current folder."""
    for name in ("data", "pairs", "teacher"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / name).symlink_to(study_of_pairs / "results" / name)
    monkeypatch.chdir(tmp_path)


class Shown:
    """A writer that keeps what it is told."""

    def __init__(self, job, folder, nimg):
        self.numbers, self.pictures, self.closed = [], [], False
        Shown.last = self

    def number(self, name, value, nimg):
        self.numbers.append((name, nimg))
        assert np.isfinite(value)

    def picture(self, name, picture, nimg):
        self.pictures.append((nimg, picture.shape))

    def close(self):
        self.closed = True


def test_what_is_watched_has_the_same_bytes(pairs, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(watching.WRITERS, "tensorboard", Shown)
    write_study(tmp_path, {"study.watch": "tensorboard"})
    called("distill", "vit")
    expected = content(trained / "results/distill/vit")
    assert content(tmp_path / "results/distill/vit") == expected
    shown = Shown.last
    assert shown.closed
    for name in ("loss", "lr", "images_per_second", "memory_gib"):
        assert (name, 320) in shown.numbers and (name, 640) in shown.numbers
    assert [nimg for nimg, _ in shown.pictures] == [320, 640]


def test_a_package_that_is_not_there_is_told_before_the_training(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_study(tmp_path, {"study.watch": "wandb"})
    sentence = refused(capsys, "distill", "vit")
    assert "study.watch is wandb" in sentence and "pip install wandb" in sentence


def test_images_that_cannot_be_made_do_not_stop_a_training(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(watching.WRITERS, "dvclive", Shown)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(watching, "open_run", broken)
    write_study(tmp_path, {"study.watch": "dvclive"})
    called("distill", "vit")
    assert "out of memory" in capsys.readouterr().err
    assert not Shown.last.pictures and (tmp_path / "results/distill/vit/0/weights.safetensors").exists()


def test_tensorboard_shows_numbers_and_images(pairs, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_study(tmp_path, {"study.watch": "tensorboard"})
    called("distill", "vit")
    events = accumulator.EventAccumulator(str(watching.FOLDER / "distill@vit-0"), {"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [320, 640]
    assert [event.step for event in events.Images("samples")] == [320, 640]


@pytest.fixture
def drawn(monkeypatch):
    """What lines are drawn of: the rows, one table each time."""
    tables = []
    monkeypatch.setattr(seaborn, "lineplot", lambda logs, **_: tables.append(logs))
    return tables


def test_the_curve_of_a_run_is_drawn_once_when_it_is_done(trained, drawn):
    equilab.watch(trained / "results/distill/vit")
    (table,) = drawn
    assert sorted(table["nimg"].unique()) == [320, 640]


def test_the_curve_of_a_run_is_drawn_again_as_long_as_it_trains(tmp_path, drawn, monkeypatch):
    folder = write_study(tmp_path)
    log = folder / ".equilab/scratch/distill@get-1/log.csv"
    log.parent.mkdir(parents=True)
    rows = pd.DataFrame({"nimg": [320], "loss": [1.0], "lr": [0.1]})
    rows.to_csv(log, index=False)
    (folder / ".equilab/locks").mkdir()
    lock = FileLock(folder / ".equilab/locks/distill@get-1")

    def wait(seconds):
        if len(drawn) == 2:
            lock.release()  # the training ends

    with lock:
        monkeypatch.setattr(time, "sleep", wait)
        equilab.watch(folder / "results/distill/get", seconds=0)
    assert len(drawn) == 3 and drawn[0]["seed"].tolist() == ["1"]


def test_a_run_that_has_reported_nothing_is_told(tmp_path):
    with pytest.raises(UserError, match="no log.csv"):
        equilab.watch(write_study(tmp_path) / "results/distill/get")
    with pytest.raises(UserError, match="not in the results of a study"):
        equilab.watch(tmp_path / "elsewhere")
