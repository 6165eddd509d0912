"""`doctor`: a line for each thing that it looks at, with a remedy where one is wrong."""

import os
import sys

import pytest
from smoke import write_study

from equilab import __main__, doctor
from equilab.core import files


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(write_study(tmp_path))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    return tmp_path


def lines(capsys, monkeypatch, *looks):
    """Return the status of `doctor`, and what it says of some of what it looks at, by name."""
    chosen = {name: doctor.LOOKS[name] for name in looks or doctor.LOOKS}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "LOOKS", chosen)
        status = __main__.main(["doctor"])
    told = capsys.readouterr().out.splitlines()
    return status, {line[7:].partition(":")[0]: line for line in told}


def test_all_is_looked_at_and_this_machine_can_run_a_study(study, capsys, monkeypatch):
    status, told = lines(capsys, monkeypatch)
    assert status == 0, told
    for name in (
        "python",
        "versions",
        "torch",
        "GPU",
        "threads",
        "kernel",
        "git",
        "locks",
        "disk",
        "locale",
        "study",
    ):
        assert name in told


def test_a_mistake_in_params_or_no_study_is_told(study, capsys, monkeypatch, tmp_path):
    params = (study / "params.yaml").read_text()
    (study / "params.yaml").write_text(params.replace("threads: 1", "threads: x"))
    status, told = lines(capsys, monkeypatch, "study")
    assert status == 1 and "study.threads" in told["study"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert lines(capsys, monkeypatch, "study", "locks")[0] == 0
    assert not list((tmp_path / "empty").iterdir())


def test_what_is_missing_is_told_with_its_remedy(study, capsys, monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + "/nowhere")
    status, told = lines(capsys, monkeypatch, "git", "dvc")
    assert status == 1 and "install it" in told["git"] and "activate" in told["dvc"]


def test_jobs_that_are_being_worked_on_are_named(study, capsys, monkeypatch):
    with files.locked("distill@get-0"):
        status, told = lines(capsys, monkeypatch, "locks")
    assert status == 0 and "distill@get-0" in told["locks"]


def test_one_look_that_fails_keeps_no_other_from_being_taken(study, capsys, monkeypatch):
    monkeypatch.setitem(doctor.LOOKS, "gpu driver", lambda: 1 / 0)
    status, told = lines(capsys, monkeypatch, "gpu driver", "python")
    assert status == 1 and "ZeroDivisionError" in told["gpu driver"] and told["python"].startswith("ok")
