"""The whole graph at toy size, as a user runs it: make, DVC, notebooks and all; and a second clone without DVC."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from smoke import ROOT, run

pytestmark = pytest.mark.slow

# by the clock, or made of what is
MEASURED = ("results/cost/", "results/measured.", "results/notebook/", "results/report/")


def clone(folder):
    """Copy what git tracks, or would, into a folder that is a repository of its own; return its smoke study."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().strip("\0").split("\0"):
        if (ROOT / name).is_file() and not name.startswith(("results/", "tests/golden/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / "studies/smoke/dvc.lock").unlink(missing_ok=True)
    return folder / "studies/smoke"


def call(study, *command, status=0):
    """Run a command in a study as a shell with the environment active would; return what it printed."""
    settings = {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "PYTHONPATH": str(study.parent.parent),
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(command, cwd=study, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def content(study):
    """Return the sha256 of every result that is no measurement."""
    files = sorted(p for p in (study / "results").rglob("*") if p.is_file() and p.name != ".gitignore")
    named = {path.relative_to(study).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.startswith(MEASURED)
    }


def stages_of(study):
    """Return what DVC has recorded of each stage."""
    return yaml.safe_load((study / "dvc.lock").read_text())["stages"]


def rewrite(study, old, new):
    """Change params.yaml; return its former text."""
    params = study / "params.yaml"
    text = params.read_text()
    assert old in text
    params.write_text(text.replace(old, new, 1))
    return text


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The smoke study of a clone, made by one command."""
    folder = clone(tmp_path_factory.mktemp("first"))
    command = ["make", "-C", "../..", "-o", ".venv/installed", "study", "STUDY=studies/smoke"]
    call(folder, *command)  # with the environment of the tests
    return folder


def test_one_command_ends_with_figures_tables_notebooks_claims_and_a_book(study):
    params = yaml.safe_load((study / "params.yaml").read_text())
    for name in ("report/index.html", "claims.md", "claims/get.csv", "measured.md", "cost/cost.csv"):
        assert (study / "results" / name).stat().st_size > 0, name
    for seed in ("0", "1"):
        assert (study / "results/evaluate/get" / seed / "metrics.json").exists()
    for notebook in params["notebook"]:
        folder = study / "results/notebook" / notebook
        assert (folder / f"{notebook}.ipynb").exists() and list(folder.glob("*.png")), notebook


def test_with_nothing_to_do_nothing_is_done(study):
    before = stages_of(study)
    call(study, "dvc", "repro")
    assert stages_of(study) == before
    assert call(study, "dvc", "status").count("\n") == 1
    shutil.rmtree(study / ".equilab/done")  # what DVC holds to be up to date is done
    assert "is done" in call(study, "python", "-m", "equilab", "submit")


def test_a_second_clone_without_dvc_has_the_same_bytes(study, tmp_path):
    other = clone(tmp_path)
    commands = ["data", "evaluator", "teacher", "pairs", "distill get", "evaluate get", "diffusion fpdm"]
    for command in [*commands, "evaluate fpdm", "features", "gan gdd"]:
        status, _, err = run(other, *command.split(), environment={"PYTHONPATH": str(other.parent.parent)})
        assert status == 0, err
    first, second = content(study), content(other)
    assert second and {name: first[name] for name in second} == second


def test_a_mistake_stops_everything_before_anything_is_done(study):
    """All that is wrong is told by the first stage, and what there is stays."""
    before = content(study)
    text = rewrite(study, "warmup: 1\n", "warmup: -1\n")
    rewrite(study, "shard: 60", "shard: 70")
    try:
        told = call(study, "dvc", "repro", status=255)
    finally:
        (study / "params.yaml").write_text(text)
    assert "cost.warmup" in told and "pairs" in told and "70" in told
    assert content(study) == before
    call(study, "dvc", "repro", "code")


def test_changing_one_run_rebuilds_one_run(study):
    text = rewrite(study, "{init: noise, iterations: 2,", "{init: noise, iterations: 1,")
    try:
        assert "code" in call(study, "dvc", "status")
        call(study, "dvc", "repro", "code")
        told = call(study, "dvc", "status")
    finally:
        (study / "params.yaml").write_text(text)
    call(study, "dvc", "repro", "code")
    assert "distill@get-noise-0:" in told
    for other in ("distill@get-0:", "distill@vit-0:", "teacher:", "diffusion@fpdm-0:"):
        assert other not in told


def test_a_stage_is_not_run_otherwise_than_dvc_records_it(study):
    """Forced by itself, with params.yaml changed since."""
    before = content(study)
    text = rewrite(study, "{init: noise, iterations: 2,", "{init: noise, iterations: 1,")
    try:
        told = call(study, "dvc", "repro", "-f", "-s", "distill@get-noise-0", status=255)
    finally:
        (study / "params.yaml").write_text(text)
    assert "dvc repro code" in told and content(study) == before


def test_a_seed_more_rebuilds_no_other_replicate(study):
    before = stages_of(study)
    text, graph = rewrite(study, "seeds: [0, 1]", "seeds: [0, 1, 2]"), (study / "dvc.yaml").read_text()
    try:
        assert "python -m equilab graph" in call(study, "dvc", "repro", "code", status=255)
        call(study, "python", "-m", "equilab", "graph")
        call(study, "dvc", "repro", "distill", "evaluate")
    finally:
        (study / "params.yaml").write_text(text)
        (study / "dvc.yaml").write_text(graph)
        after = stages_of(study)
        call(study, "dvc", "repro", "code")
    assert after.keys() - before.keys() == {"distill@get-2", "evaluate@get-2"}
    assert {name for name in before if after[name] != before[name]} <= {"code"}
