"""Published weights in place of training: checked against params and data, then a study goes on from them to its figures."""

import json
import re

import authors
import numpy as np
import pytest
import torch
import yaml
from smoke import ROOT, write_study

from equilab import __main__, dvc, study
from equilab.core import like
from equilab.models.checkpoint import load_network
from equilab.published.files import published_files

IMAGE, CLASSES = (1, 8, 8), 10
SMOKE = like.read(ROOT / "studies/smoke/params.yaml")
TRAINING = ("sigma_mean", "sigma_std", "optimisation", "equilibrium", "pairs", "loss")


def published(entry, family, path, **more):
    """Return the entry of a run whose weights are in a file."""
    kept = {key: value for key, value in entry.items() if key not in TRAINING}
    return {**kept, "published": {"family": family, "path": path, **more}}


TEACHER = published(SMOKE["teacher"], "edm", "edm.pkl")
GET = published(SMOKE["distill"]["get-noise"], "get", "get.pt")


def network(stage, entry):
    """Return a run's network with weights that are drawn, so that all of them matter."""
    sections = study.Sections({stage: entry}, "params.yaml", ROOT)
    net = study.config_of(sections, stage).network.build(IMAGE, CLASSES)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return net


def teacher_file(folder, sigma_data=0.75):
    """Write the smoke study's teacher as EDM's training writes one; return its weights."""
    weights = network("teacher", TEACHER).state_dict()
    authors.nvidia(folder / "edm.pkl", weights, "EDMPrecond", sigma_data=sigma_data)
    return weights


def get_file(folder):
    """Write a GET as GET's training writes one."""
    sections = study.Sections({"distill": {"get": GET}}, "params.yaml", ROOT)
    family = study.config_of(sections, "distill", "get").family
    net = study.config_of(sections, "distill", "get").network.build(IMAGE, CLASSES)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():  # those of the final layer start at zero
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    theirs = {key: net.state_dict()[ours] for key, ours in family.published.keys(net).items()}
    authors.training(folder / "get.pt", theirs, {"lr": 1e-4})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A study whose teacher and whose GET are published ones, with its data."""
    absent = dict.fromkeys(["gan", "consistency", "progressive", "relative", "activation", "diffusion"], ...)
    others = ("fpdm", "dit", "gdd", "gdd-i-2", "cd", "pd-2", "pd-1", "get")
    absent |= {f"evaluate.{run}": ... for run in others}
    absent |= {
        f"notebook.{name}": ...
        for name in ("sampling_speed", "reuse_smoothing", "one_step", "layer_activation", "00_tour")
    }
    changes = {**absent, "teacher": TEACHER, "distill": {"vit": SMOKE["distill"]["vit"], "get-noise": GET}}
    changes |= {"cost.runs": ["teacher", "distill/get-noise", "distill/vit"]}
    changes["comparisons"] = {
        "get against vit, parameters": {"runs": ["distill/get-noise"], "baseline": ["distill/vit"]}
    }
    folder = write_study(tmp_path / "study", changes)
    monkeypatch.chdir(folder)
    return folder


def call(*arguments):
    return __main__.main([*arguments])


def test_a_published_teacher_is_one_that_all_stages_go_on_from(folder):
    weights = teacher_file(folder)
    assert call("data") == 0 and call("teacher") == 0
    sections = study.open_study(folder / "params.yaml")
    path = folder / "results/teacher/weights.safetensors"
    net, about = load_network(path, study.config_of(sections, "teacher"))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in weights.items())
    assert about["published"]["file"] == "edm.pkl" and about["nimg"] == 0
    summary = json.loads((folder / "results/teacher/summary.json").read_text())
    assert summary["config"]["published"]["family"] == "edm" and summary["classes"] == CLASSES


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher.network.width": 16}, "teacher: edm.pkl .*network.width 8, .* 16"),
        ({"teacher.network.attention": []}, r"network.attention \[4\], .* \[\]"),
        ({"teacher.sigma_data": 0.5}, "sigma_data 0.75, .* 0.5"),
        ({"teacher.conditional": False}, "classes 10, .* 0"),
        ({"teacher.published.family": "gdd"}, "published.family .*gdd, .* edm"),
        (
            {"teacher.published.path": "edm-cifar10-32x32-cond-vp.pkl"},
            "nvlabs-fi-cdn.nvidia.com/edm/pretrained/",
        ),
        ({"teacher.published.path": "edm-cifar10-32x32-cond-vp.pkl"}, "223 MB"),
        ({"teacher.published.path": "edm-cifar10.pkl"}, "'edm-cifar10-32x32-cond-v"),
        ({"teacher.optimisation": SMOKE["teacher"]["optimisation"]}, "teacher.optimisation: "),
        ({"teacher.published.pth": "a"}, "did you mean 'path'"),
    ],
)
def test_a_file_that_does_not_fit_is_told(folder, changes, sentence, capsys):
    teacher_file(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for path, value in changes.items():
        *above, last = path.split(".")
        place = params
        for key in above:
            place = place[key]
        place[last] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert call("teacher") == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (folder / "results/teacher").exists()


def test_check_names_each_file_that_is_not_there(folder, capsys):
    assert call("check") == 2
    told = capsys.readouterr().err
    assert "teacher.published.path: edm.pkl " in told
    assert "distill.get-noise.published.path: get.pt " in told


def test_what_is_optional_and_not_there_is_left_out_with_what_names_it(folder, capsys):
    teacher_file(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["distill"]["get-noise"]["published"]["optional"] = True
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    sections = study.read(folder / "params.yaml")
    assert sections.runs("distill") == ["vit"] and "get-noise" not in sections.runs("evaluate")
    assert (
        sections.values["cost"]["runs"] == ["teacher", "distill/vit"] and not sections.values["comparisons"]
    )
    assert call("check") == 0
    get_file(folder)
    assert study.read(folder / "params.yaml").runs("distill") == ["get-noise", "vit"]
    for path in ("edm.pkl", "get.pt"):
        (folder / path).unlink()
    params["teacher"]["published"]["optional"] = True
    del params["distill"]["vit"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    assert call("check") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "get.pt, edm.pkl" in told[0]


def test_another_file_is_other_work(folder):
    teacher_file(folder)
    sections = study.open_study(folder / "params.yaml")
    assert "edm.pkl" in dvc.graph(sections)["stages"]["code"]["deps"]
    before = dvc.code_files(sections)
    teacher_file(folder, sigma_data=0.5)
    after = dvc.code_files(sections)
    assert {path for path in before if before[path] != after[path]} == {"results/code/params/teacher.json"}
    assert "equilab/published/stage.py" in before["results/code/teacher.txt"]


def test_the_table_of_files_is_that_of_the_docs():
    page = (ROOT / "docs/checkpoints.md").read_text()
    for row in published_files():
        assert row.file in page and row.content in page, row.file
        assert f"{row.megabytes} MB" in page or f"{row.megabytes / 1000:.2f} GB" in page, row.file


@pytest.mark.slow
def test_a_study_goes_from_published_weights_to_figures(folder):
    teacher_file(folder)
    get_file(folder)
    commands = [
        "data",
        "evaluator",
        "teacher",
        "pairs",
        "distill get-noise",
        "distill vit",
        "evaluate teacher",
    ]
    commands += ["evaluate get-noise", "evaluate vit", "cost", "claims", "notebook scaling", "report"]
    for command in commands:
        assert call(*command.split()) == 0, command
    assert list((folder / "results/notebook/scaling").glob("*.png"))
    assert (folder / "results/report/index.html").exists()
    images = np.load(folder / "results/evaluate/get-noise/0/samples.npy")
    assert images.shape == (100, *IMAGE) and images.std() > 0
