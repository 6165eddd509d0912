"""Several processes: how they are started, the same pairs and samples whatever their number, and one that dies."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm import wait
from smoke import refused, start, write_study
from test_killed import content

from equilab import __main__
from equilab.core.config import UserError, parse
from equilab.core.job import Study
from equilab.models.checkpoint import load_tensors

TWO = "torchrun --standalone --nproc-per-node 2 -m equilab"
GIVEN = {"name": "t", "root": ".", "seed": 0, "threads": 1, "run_threads": 1, "device": "cpu"}


@pytest.mark.parametrize(
    "launch", ["python -m equilab", TWO, "torchrun --nnodes=2 --rdzv-endpoint host:29500 -m equilab"]
)
def test_a_stage_is_started_by_python_or_torchrun(launch):
    assert parse(Study, {**GIVEN, "launch": launch}, "study").launch == launch


@pytest.mark.parametrize(
    "launch",
    [
        "rm -rf x",
        "torchrun -m other",
        "torchrun -m equilab; rm -rf x",
        "torchrun --standalone mine.py -m equilab",
        "torchrun --no-python -m equilab",
        "torchrun --nproc-per-node $(rm) -m equilab",
        "torchrun --nproc-per-node -m equilab",
        "python -m equilab\nrm",
    ],
)
def test_nothing_else_is_started(launch):
    with pytest.raises(UserError, match="study.launch"):
        parse(Study, {**GIVEN, "launch": launch}, "study")


def test_a_process_of_half_a_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_study(tmp_path, {"study.launch": TWO}))
    monkeypatch.setenv("RANK", "1")
    assert "torchrun" in refused(capsys, "data")


def test_short_stages_are_done_by_the_first_process(tmp_path, monkeypatch):
    monkeypatch.chdir(write_study(tmp_path))
    for name, value in zip(__main__.TORCHRUN, ("1", "1", "2", "localhost", "1")):
        monkeypatch.setenv(name, value)
    assert __main__.main(["data"]) == 0
    assert not (tmp_path / "results").exists()


@pytest.fixture
def copy(study_of_pairs, tmp_path):
    """A study of two processes with data and a teacher."""
    shutil.copytree(study_of_pairs, tmp_path / "study")
    shutil.rmtree(tmp_path / "study/.equilab")
    return write_study(tmp_path / "study", {"study.launch": TWO})


def ended(process):
    """Return the exit status of a process, which must end within a minute, and what it said."""
    _, err = process.communicate(timeout=60)
    return process.returncode, [line for line in err.splitlines() if line.startswith("equilab: ")]


@pytest.mark.slow
def test_two_processes_write_the_same_pairs_and_train_the_same_generator_to_rounding(
    study_of_pairs,
    copy,
    monkeypatch,
):
    shutil.rmtree(copy / "results/pairs")
    for command in (["pairs"], ["distill", "vit"]):
        process = start(copy, *command)
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert content(copy / "results/pairs") == content(study_of_pairs / "results/pairs")
    monkeypatch.chdir(study_of_pairs)
    assert __main__.main(["distill", "vit"]) == 0
    folders = [folder / "results/distill/vit/0" for folder in (copy, study_of_pairs)]
    assert [json.loads((f / "summary.json").read_text())["environment"]["processes"] for f in folders] == [
        2,
        1,
    ]
    two, one = (load_tensors(folder / "weights.safetensors")[0] for folder in folders)
    # Adam divides by gradients near 0: rounding grows
    torch.testing.assert_close(two, one, rtol=1e-3, atol=5e-4)
    losses = [np.genfromtxt(f / "log.csv", delimiter=",", names=True)["loss"] for f in folders]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_try_a_run_in_a_folder_of_its_own(copy):
    before = content(copy / "results/distill")
    tried = ("--set", "optimisation.lr=1e-4", "--out", "results/try1")
    assert ended(start(copy, "distill", "vit", *tried))[0] == 0
    about = load_tensors(copy / "results/try1/0/weights.safetensors")[1]
    assert about["config"]["optimisation"]["lr"] == 1e-4
    assert content(copy / "results/distill") == before


def workers(folder):
    """Return the processes that torchrun started for a study."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if b"--params" in words and os.readlink(f"/proc/{entry}/cwd") == str(folder):
                found.append(int(entry))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc"), reason="finds processes in /proc")
def test_a_process_that_dies_ends_all_and_another_number_of_them_goes_on(copy):
    changes = {"distill.vit.optimisation.nimg": 32_000}
    write_study(copy, {"study.launch": TWO, **changes})
    process = start(copy, "distill", "vit")
    log = copy / ".equilab/scratch/distill@vit-0/log.csv"
    wait(log.exists)
    os.kill(workers(copy)[-1], signal.SIGKILL)
    status, said = ended(process)
    (sentence,) = [line for line in said if "SIGKILL" in line]
    assert status == 1 and "the same command continues" in sentence
    assert not workers(copy)
    write_study(copy, changes)
    process = start(copy, "distill", "vit")
    _, err = process.communicate()
    assert process.returncode == 0 and "another number of processes (2, then 1)" in err
    summary = json.loads((copy / "results/distill/vit/0/summary.json").read_text())
    assert summary["environment"]["processes"] == [2, 1]


@pytest.mark.slow
def test_a_mistake_is_told_once_more_than_nothing_and_ends_all(copy):
    write_study(copy, {"study.launch": TWO, "distill.vit.optimisation.micro_batch": 1})
    began = time.monotonic()
    status, said = ended(start(copy, "distill", "vit"))
    assert status == 2 and any("micro_batch" in line for line in said) and time.monotonic() - began < 60
