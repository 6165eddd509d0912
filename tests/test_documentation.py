"""What README and docs say can be done: links lead somewhere, commands exist, Python and YAML are what the package reads."""

import argparse
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import golden, weights_of
from sklearn.datasets import load_digits

import equilab
from equilab import __main__, graph
from equilab.claims.claim import Claim
from equilab.claims.comparisons import Comparison
from equilab.core.config import parse
from equilab.tables import Results

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (*graph.STAGES, *__main__.COMMANDS, *__main__.OWN)


def blocks(page, language):
    """Return the fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def anchors(page):
    """Return the names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if heading:
            assert heading in anchors(target), f"{page.name} links to {link}, which is no heading there"


@each_page
def test_commands_exist(page):
    text = page.read_text()
    commands = "\n".join([*re.findall(r"`([^`\n]+)`", text), *blocks(page, "(?:bash)?")])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"\bmake ([a-z-]+)", commands):
        assert target in targets, f"{page.name} names `make {target}`, the Makefile does not"
    for command in re.findall(r"-m equilab ([a-z]+)", commands):
        assert command in COMMANDS, f"{page.name} names the command {command}, which is none"
    for name in re.findall(r"studies/([a-z0-9-]+)", commands):
        assert (ROOT / "studies" / name / "params.yaml").exists(), f"{page.name} names the study {name}"


@each_page
def test_yaml_can_be_read(page):
    for block in blocks(page, "yaml"):
        list(yaml.parse(block))  # syntax alone: an anchor may be that of another file


def test_the_readme_names_every_page():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in readme


def test_the_python_of_the_readme_runs_on_the_committed_results():
    (code,) = (block for block in blocks(ROOT / "README.md", "python") if "equilab.results" in block)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distill/get-m" in done.stdout


def test_the_three_lines_of_the_readme_draw_images(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = (block for block in blocks(ROOT / "README.md", "python") if "equilab.load" in block)
    exec(code, {})
    assert "(16, 1, 8, 8) 1 [" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["get", "vit", "gdd-i", "fpdm"])
def test_the_models_that_are_committed_draw_digits(name):
    """The mean image of each class is nearer to the mean of the real ones than to that of any other class."""
    labels = np.repeat(np.arange(10), 32)
    images = equilab.load(ROOT / "models" / name).sample(len(labels), label=labels, seed=1).images
    ours = images.reshape(10, 32, 64).mean(1) / 255
    digits = load_digits()
    real = np.stack([digits.data[digits.target == label].mean(0) for label in range(10)]) / 16
    distances = np.linalg.norm(ours[:, None] - real, axis=-1)
    assert list(distances.argmin(1)) == list(range(10))


def test_the_model_of_the_docs_is_a_family_with_a_network_that_generates():
    code = next(block for block in blocks(ROOT / "docs/extending.md", "python") if "FAMILY" in block)
    names = {"__name__": "mlp"}
    exec(code, names)
    family = names["FAMILY"]
    net = family.network((1, 8, 8), 10, width=16, depth=2)
    image, solution = net(torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 9]))
    assert image.shape == (3, 1, 8, 8) and solution is None
    assert net.blocks() == 2
    assert (
        family.network((1, 8, 8), 0, width=16, depth=2)(torch.randn(1, 1, 8, 8), None).image.isfinite().all()
    )


def test_the_template_reads_the_images_that_the_docs_make(tmp_path, monkeypatch, capsys):
    code = next(block for block in blocks(ROOT / "docs/extending.md", "python") if "load_digits" in block)
    text = (ROOT / "studies/template/params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("root: ../..", f"root: {ROOT}"))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    for command in ("check", "data"):
        assert __main__.main([command]) == 0, capsys.readouterr().err
    assert (tmp_path / "results/data/train_labels.npy").exists()


def test_the_docs_name_every_key_of_comparisons_and_claims_and_every_table_of_results():
    page = (ROOT / "docs/extending.md").read_text()
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    members = {name: each for name, each in vars(Results).items() if isinstance(each, cached_property)}
    tables = {name for name, each in members.items() if each.func.__annotations__["return"] == "pd.DataFrame"}
    keys = {*Claim.model_fields, *Comparison.model_fields}
    assert named >= keys | {name for name in tables if not name.startswith("_")}


def test_weights_are_imported_and_loaded_as_the_docs_say(tmp_path, monkeypatch):
    page = ROOT / "docs/checkpoints.md"
    (load,) = blocks(page, "python")
    command = re.search(r"^python -m equilab (import .*)$", page.read_text(), re.M)[1]
    checkpoint = {"ema": weights_of(golden("get_uncond")[0]), "args": argparse.Namespace(batch=1)}
    torch.save(checkpoint, tmp_path / "GET-M.pth")
    monkeypatch.chdir(tmp_path)
    assert __main__.main(command.replace("heads=6", "heads=2").split()) == 0
    assert (tmp_path / "results/imported/get-m-theirs/weights.safetensors").exists()
    names = {}
    exec(load.replace("heads=6", "heads=2"), names)
    assert names["samples"].images.shape == (16, *names["model"].run.shape)
    assert names["samples"].iterations.tolist() == [6] * 16


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors", "version"))
    assert all(each["title"] and each["authors"] and each["year"] for each in citation["references"])
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert citation["version"] == version


@each_page
def test_claims_and_comparisons_are_what_the_package_reads(page):
    for block in blocks(page, "yaml"):
        if block.startswith("claims:"):
            for entry in yaml.safe_load(block)["claims"]:
                parse(Claim, entry, page.name)
        if block.startswith("comparisons:"):
            for name, entry in yaml.safe_load(block)["comparisons"].items():
                parse(Comparison, entry, f"{page.name}: {name}")
