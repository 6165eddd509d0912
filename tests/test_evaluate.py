"""What is made of trained runs: samples and scores, distances between runs, activity of layers, cost."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from smoke import write_study

from equilab import __main__
from equilab.core import config as configs
from equilab.core.config import UserError
from equilab.core.files import sha256_of, write_arrays, write_table
from equilab.metrics.fidelity import Scorer
from equilab.sampling.generators import load
from equilab.sampling.settings import Solve
from equilab.study import Replicate, job_of, module_of, open_study

STAGES = ("data", "evaluator", "teacher", "pairs", "distill", "evaluate")


def called(folder, *command):
    """Return the exit status of a command in the study of a folder."""
    before = Path.cwd()
    try:
        return __main__.main([*command, "--params", str(folder / "params.yaml")])
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study with a teacher, a GET and a ViT of two seeds; all is trained and evaluated, the teacher in bf16."""
    absent = ["features", "diffusion", "gan", "distill.get-noise"]
    absent += [
        f"evaluate.{name}" for name in ("get-noise", "fpdm", "dit", "gdd", "gdd-i-2", "cd", "pd-2", "pd-1")
    ]
    changes = {
        "distill.vit.seeds": [1, 3],
        "evaluate.teacher.precision": "bf16",
        "relative.runs": ["get", "vit"],
        "activation.runs": ["teacher", "distill/get"],
        "cost.runs": ["teacher", "distill/get", "distill/vit"],
    }
    folder = write_study(tmp_path_factory.mktemp("study"), dict.fromkeys(absent, ...) | changes)
    sections = configs.read(folder / "params.yaml")
    for stage in STAGES:
        for run in sections[stage] if stage in ("distill", "evaluate") else [None]:
            assert called(folder, stage, *([run] if run else [])) == 0
    return folder


def metrics(study, run, seed):
    return json.loads((study / f"results/evaluate/{run}/{seed}/metrics.json").read_text())


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def scores(study, folder):
    """Return the scores of the samples in a folder, computed in float32 by themselves."""
    results = study / "results"
    scorer = Scorer(results / "evaluator", results / "data", study / "cache", torch.device("cpu"))
    return scorer.scores(np.load(folder / "samples.npy"))


@pytest.mark.parametrize(("run", "seed"), [("teacher", 0), ("get", 1)], ids=["bf16", "fp32"])
def test_scores_are_those_of_the_samples_in_float32_whatever_they_were_made_in(study, run, seed):
    found = metrics(study, run, seed)
    for key, value in scores(study, study / f"results/evaluate/{run}/{seed}").items():
        assert found[key] == value, key


def test_a_replicate_says_what_it_is_of(study):
    assert sorted(path.name for path in (study / "results/evaluate/vit").iterdir()) == ["1", "3"]
    for run, seed, of, family in (
        ("teacher", 0, "teacher", "edm"),
        ("get", 1, "distill/get", "get"),
        ("vit", 3, "distill/vit", "vit"),
    ):
        found = metrics(study, run, seed)
        assert (found["run"], found["seed"], found["of"], found["family"]) == (run, seed, of, family)
    assert metrics(study, "get", 0)["fd_train"] != metrics(study, "get", 1)["fd_train"]


def test_samples_are_the_runs_at_its_headline_setting(study):
    get = load("distill/get", 1, study=study)
    setting = configs.parse(
        Solve, configs.read(study / "params.yaml")["evaluate"]["get"]["solver"][0], "solver"
    )
    images = get.generate(get.inputs(0, np.arange(50), setting), setting).image
    kept = np.load(study / "results/evaluate/get/1/samples.npy")
    assert kept.shape == (100, 1, 8, 8) and kept.dtype == np.uint8
    assert np.abs(kept[:50] / 127.5 - 1 - images.clamp(-1, 1).numpy()).max() < 0.01


def test_a_sweep_has_a_row_a_setting_with_its_cost_and_a_curve_a_row_a_snapshot(study):
    rows = table(study / "results/evaluate/get/0/sweep.csv")
    assert [row["most_iterations"] for row in rows] == ["3", "1", "6", "3", "3"]
    assert float(rows[0]["fd_train"]) == pytest.approx(metrics(study, "get", 0)["fd_train"], rel=1e-8)
    per_iteration = (float(rows[0]["flops"]) - float(rows[1]["flops"])) / 2
    assert float(rows[2]["flops"]) == pytest.approx(
        float(rows[1]["flops"]) + per_iteration * (float(rows[2]["iterations"]) - 1)
    )
    assert all(row["l1_held_out"] for row in rows)
    curve = table(study / "results/evaluate/get/0/curve.csv")
    assert [row["nimg"] for row in curve] == ["320", "640"] and float(curve[1]["fd_test"]) > 0
    with np.load(study / "results/evaluate/get/0/iterates.npz") as kept:
        assert kept["images"].shape == (24, 16, 1, 8, 8) and kept["residual"].shape == (256, 24)
    with np.load(study / "results/evaluate/teacher/0/iterates.npz") as kept:
        assert kept["images"].shape == (3, 16, 1, 8, 8) and kept["image_1"].shape == (16, 1, 8, 8)


def test_runs_are_compared_within_the_seeds_that_all_have(study):
    assert called(study, "relative") == 0
    rows = table(study / "results/relative/relative.csv")
    assert [tuple(row[key] for key in ("seed", "first", "second", "images", "noises")) for row in rows] == [
        ("1", "get", "vit", "100", "same"),
        ("1", "vit", "get", "100", "same"),
        ("1", "get", "get", "50", "others"),
        ("1", "get", "vit", "50", "others"),
    ]
    assert float(rows[2]["distance"]) > 0
    assert float(rows[0]["distance"]) == pytest.approx(float(rows[1]["distance"]), rel=1e-6)


def test_activity_is_of_all_seeds_and_cost_of_the_first_and_both_say_of_which_run(study):
    assert called(study, "activation") == called(study, "cost") == 0
    activity = table(study / "results/activation/activation.csv")
    seen = {(row["of"], row["seed"], row["family"]) for row in activity}
    assert seen == {("teacher", "0", "edm"), ("distill/get", "0", "get"), ("distill/get", "1", "get")}
    get = [
        [row["rms"] for row in activity if (row["of"], row["seed"]) == ("distill/get", seed)] for seed in "01"
    ]
    assert len(get[0]) == len(get[1]) and get[0] != get[1]
    layers = {row["layer"] for row in activity if row["of"] == "teacher"}
    assert len(layers) > 5 and all(layer.startswith(("enc.", "dec.")) for layer in layers)
    cost = table(study / "results/cost/cost.csv")
    assert {(row["of"], row["seed"]) for row in cost} == {
        ("teacher", "0"),
        ("distill/get", "0"),
        ("distill/vit", "1"),
    }
    get = [row for row in cost if row["of"] == "distill/get"]
    assert [(row["what"], row["iterations"]) for row in get[:2]] == [("sample", "1"), ("sample", "3")]
    assert [(row["gradient"], row["as_trained"]) for row in get[2:]] == [
        ("unrolled", "True"),
        ("o1", "False"),
    ]
    assert all(float(row["seconds"]) > 0 and float(row["memory_mib"]) > 0 for row in cost)


@pytest.mark.parametrize(
    ("stage", "change", "key"),
    [
        ("evaluate", {"sampler": [{"method": "heun"}]}, "evaluate.get.sampler[0].steps"),
        ("evaluate", {"solver": []}, "evaluate.get: "),
        ("evaluate", {"of": "distill/gett"}, "evaluate.get.of"),
        ("evaluate", {"batch": 0}, "evaluate.get.batch"),
        ("relative", {"runs": ["get", "teacher", "vit"]}, "relative.runs: get, teacher, vit "),
        ("relative", {"runs": ["get"]}, "relative.runs"),
        ("activation", {"runs": ["consistency/cd", "teacher"]}, "consistency/cd"),
        ("activation", {"runs": ["distill/vit"]}, "distill/vit, a ViT"),
        ("activation", {"iterations": 1}, "activation.iterations"),
        ("cost", {"runs": ["teacher", "teacher"]}, "cost.runs: 'teacher'"),
        ("cost", {"iterations": []}, "cost.iterations"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_work(study, tmp_path, stage, change, key):
    values = configs.read(study / "params.yaml")
    run = "get" if stage == "evaluate" else None
    section = values[stage][run] if run else values[stage]
    section |= change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as error:
        sections = open_study(tmp_path / "params.yaml")
        job = job_of(sections, stage, Replicate(run, sections.seeds(stage, run)[0] if run else None))
        config = job.read(stage, run, job.seed)
        module_of(stage, config).plan(config, job)
    assert key in str(error.value)


def test_scores_are_compared_with_a_floor_of_as_many_samples(study, tmp_path, capsys):
    (tmp_path / "results").symlink_to(study / "results")
    sections = configs.read(study / "params.yaml")
    sections["evaluator"]["samples"] = 101
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections))
    assert called(tmp_path, "evaluate", "vit", "--seed", "1") == 2
    told = capsys.readouterr().err
    assert re.search("samples 100, .* 101; .*`python -m equilab evaluator`", told)


@pytest.fixture
def copied(study, tmp_path):
    """A copy of the study's folder."""
    shutil.copytree(study, tmp_path / "study")
    return tmp_path / "study"


def rewrite(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("again", "run", "told"),
    [
        (
            (),
            "vit",
            "results/evaluator/summary.json .*results/data .*`python -m equilab evaluator`",
        ),
        (("evaluator",), "vit", "results/teacher/weights.safetensors .*results/data "),
        (("evaluator",), "teacher", "results/data .*`python -m equilab teacher`"),
    ],
)
def test_what_was_made_of_other_images_is_refused(copied, capsys, again, run, told):
    rewrite(copied / "results/data/meta.json", source="elsewhere")
    inputs = {"data": sha256_of(copied / "results/data/meta.json")}
    for stage in again:
        rewrite(copied / f"results/{stage}/summary.json", inputs=inputs)
    assert called(copied, "evaluate", run, "--seed", "1" if run == "vit" else "0") == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_generator_of_other_pairs_is_refused(copied, capsys):
    rewrite(copied / "results/pairs/meta.json", environment="another")
    assert called(copied, "evaluate", "vit", "--seed", "1") == 2
    told = capsys.readouterr().err
    weights, remedy = "results/distill/vit/1/weights.safetensors", "`python -m equilab distill vit --seed 1`"
    assert re.search(f"{weights} .*results/pairs.*{remedy}", told)


def test_a_stage_ends_with_a_line_of_what_came_of_it(study, capsys):
    assert called(study, "evaluate", "vit", "--seed", "1") == 0
    found = metrics(study, "vit", 1)
    train, test = (f"{found[f'fd_{split}']:.4g}" for split in ("train", "test"))
    assert (
        capsys.readouterr().out
        == f"evaluate@vit-1: FD {train} to training images, {test} to held-out images\n"
    )


def test_arrays_and_tables_have_the_same_bytes_always(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array([True])}
    write_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as kept:
        assert all(np.array_equal(kept[name], array) for name, array in arrays.items())
    first = (tmp_path / "a.npz").read_bytes()
    write_arrays(tmp_path / "a.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == first
    write_table(tmp_path / "a.csv", [{"x": 1 / 3, "n": 12345678901}, {"y": None, "x": 2.0}])
    assert (tmp_path / "a.csv").read_text() == "x,n,y\n0.333333333,12345678901,\n2,,\n"
