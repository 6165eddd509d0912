"""`--set KEY=VALUE --out FOLDER`: tries of a run, beside the study's results."""

import json
import re
from pathlib import Path

import pytest
from smoke import called, refused, write_study

from equilab import launching
from equilab.models.checkpoint import read_metadata
from equilab.trying import TRAINED


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study that has its data, current folder."""
    monkeypatch.chdir(write_study(tmp_path))
    called("data")
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_try_is_trained_with_what_is_set_and_leaves_the_study_as_it_was(study):
    before = content("results")
    setting = ("--set", "optimisation.nimg=320", "--set", "optimisation.snapshots=[]", "--set", "images=all")
    called("evaluator", *setting, "--out", "results/try1")
    assert {path: text for path, text in content("results").items() if "try1" not in path.parts} == before
    config = read_metadata(Path("results/try1/weights.safetensors"))["config"]
    assert (config["optimisation"]["nimg"], config["images"]) == (320, "all")
    record = json.loads(Path("results/try1/try.json").read_text())
    assert record["stage"] == "evaluator" and record["set"]["images"] == "all"
    assert not list(Path(".equilab/scratch").iterdir())


def test_every_stage_that_trains_can_be_tried_and_no_other(study, capsys):
    assert {"evaluator", "teacher", "features", "distill", "diffusion", "gan", "consistency"} <= {*TRAINED}
    assert "progressive" in TRAINED and "pairs" not in TRAINED
    assert "pairs" in refused(capsys, "pairs", "--set", "count=3", "--out", "x")


def test_a_try_of_a_run_has_a_folder_for_each_seed_and_says_its_config(study, capsys):
    called("distill", "get", "--set", "optimisation.lr=5e-1", "--out", "x", "--dry-run")
    assert capsys.readouterr().out.count("lr: 0.5") == 2
    assert not Path("x").exists()


def test_a_try_is_handed_on_to_the_processes_that_share_it(study, monkeypatch, capsys):
    """From another folder than the study's: that of `--out` is the one that was meant."""
    write_study(study, {"study.launch": "torchrun --standalone --nproc-per-node 2 -m equilab"})
    handed_on = []
    monkeypatch.setattr(launching, "processes", lambda launch, arguments: handed_on.extend(arguments) or 0)
    monkeypatch.chdir(study / "results")
    given = ("--params", "../params.yaml", "--set", "optimisation.lr=5e-1", "--set", "network.depth=1")
    called("distill", "vit", "--seed", "0", *given, "--out", "try1")
    assert "--out=results/try1" in handed_on
    called(*handed_on, "--dry-run")
    planned = capsys.readouterr().out
    assert "lr: 0.5" in planned and "depth: 1" in planned


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimisation.lrr=1e-3", "distill.get.optimisation.lrr: .* 'lr'"),
        ("optimsation.lr=1e-3", "did you mean 'optimisation'"),
        ("optimisation.lr=fast", "distill.get.optimisation.lr: .* number"),
        ("network.heads=3", "heads"),
        ("pairs.count=3", "pairs .*200"),
        ("optimisation.lr", "--set optimisation.lr: "),
        ("optimisation.betas=[0.9", r"--set optimisation.betas: .*\[0.9"),
        ("seeds=[5]", "--seed"),
    ],
)
def test_what_is_set_is_checked_like_params(setting, words, study, capsys):
    told = refused(capsys, "distill", "get", "--set", setting, "--out", "x", "--dry-run")
    assert re.search(words, told)
    assert not Path("x").exists()


def test_a_try_needs_a_folder_of_its_own(study, capsys):
    arguments = ("evaluator", "--set", "optimisation.nimg=320")
    assert "--out FOLDER" in refused(capsys, *arguments)
    for taken in ("results", "results/distill/get", ".", "results/code"):
        assert f"--out {taken}:" in refused(capsys, *arguments, "--out", taken)
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("a")
    assert "--out mine: " in refused(capsys, *arguments, "--out", "mine")
    assert "--out mine/a.txt: " in refused(capsys, *arguments, "--out", "mine/a.txt")
    called(*arguments, "--out", "x")
    first = content("x")
    called(*arguments, "--out", "x")
    assert content("x") == first
    told = refused(capsys, "evaluator", "--set", "optimisation.lr=1.0", "--out", "x")
    assert "optimisation.nimg=320" in told and content("x") == first
