"""The whole graph at toy size, as a user runs it: DVC, papermill and all; and a second clone without DVC."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from forked import HERE, context, run, serve

ROOT = HERE.parent
MEASURED = (
    "results/cost/",
    "results/measured.",
    "results/notebook/sampling_speed",
    "results/notebook/reuse_smoothing",
    "results/report/",
)


def clone(folder):
    """Copy what git tracks, or would, into a folder that is a repository of its own; return its smoke study."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in names.stdout.decode().strip("\0").split("\0"):
        if (ROOT / name).is_file() and not name.startswith(
            ("results/", "studies/smoke/results/", "tests/golden/")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / "studies/smoke/dvc.lock").unlink(missing_ok=True)
    return folder / "studies/smoke"


def call(study, *command):
    """Run a command in a study as a shell with the environment active would; `python` starts warm. Return its output."""
    path = os.pathsep.join([str(HERE), os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(study.parent.parent),
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(command, cwd=study, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def content(study):
    """Return the sha256 of every result that is no measurement."""
    files = sorted(p for p in (study / "results").rglob("*") if p.is_file() and p.name != ".gitignore")
    named = {p.relative_to(study).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return {name: value for name, value in named.items() if not name.startswith(MEASURED)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    os.environ["WARM_PYTHON"] = str(tmp_path_factory.mktemp("warm") / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ["WARM_PYTHON"])
        listener.listen()
        server = context.Process(target=serve, args=(listener,))
        server.start()
    try:
        folder = clone(tmp_path_factory.mktemp("first"))
        call(
            folder, "make", "-C", "../..", "-o", ".venv/installed", "study", "STUDY=studies/smoke", "EACH=8"
        )  # this environment's
        yield folder
    finally:
        server.kill()


def test_one_command_ends_with_figures_tables_notebooks_claims_and_a_book(study):
    for name in (
        "notebook/scaling/scaling.ipynb",
        "notebook/sampling_speed/sampling_speed.ipynb",
        "report/index.html",
        "claims.md",
        "claims.csv",
        "measured.md",
        "cost/cost.csv",
        "evaluate/get/metrics.json",
    ):
        assert (study / "results" / name).stat().st_size > 100, name
    for notebook in ("scaling", "sampling_speed", "reuse_smoothing"):
        assert list((study / "results/notebook" / notebook).glob("*.png"))
        assert list((study / "results/notebook" / notebook).glob("*.csv"))


def test_with_nothing_to_do_nothing_is_done(study):
    assert "Data and pipelines are up to date." in call(study, "dvc", "repro")


def test_a_second_clone_without_dvc_has_the_same_bytes(study, tmp_path):
    other = clone(tmp_path)
    for stage in (
        ["data"],
        ["evaluator"],
        ["teacher"],
        ["pairs"],
        ["distill", "get"],
        ["evaluate", "get"],
        ["diffusion", "fpdm"],
        ["evaluate", "fpdm"],
        ["features"],
        ["gan", "gdd"],
    ):
        assert run(other, stage) == 0, (other / "log").read_text()
    first, second = content(study), content(other)
    assert len(second) > 35
    assert {name: first[name] for name in second} == second


def test_a_stage_that_fails_leaves_its_results_as_they_were(study):
    params, before = study / "params.yaml", (study / "results/cost/cost.csv").read_bytes()
    text = params.read_text()
    params.write_text(text.replace("\n  warmup: 1\n", "\n  warmup: -1\n"))
    assert params.read_text() != text
    with pytest.raises(AssertionError, match="warmup >= 0"):
        call(study, "dvc", "repro", "cost")
    params.write_text(text)
    call(study, "dvc", "repro", "code")
    assert (study / "results/cost/cost.csv").read_bytes() == before


def test_changing_one_run_rebuilds_one_run(study):
    before = yaml.safe_load((study / "dvc.lock").read_text())["stages"]
    params = study / "params.yaml"
    text = params.read_text()
    params.write_text(
        text.replace(
            "{init: noise, iterations: 2, gradient: jfb", "{init: noise, iterations: 1, gradient: jfb"
        )
    )
    assert "code:" in call(study, "dvc", "status", "dvc.yaml")
    call(study, "dvc", "repro", "code")
    told = call(study, "dvc", "status", "dvc.yaml")
    params.write_text(text)
    assert (
        "distill@get-noise" in told
        and "distill@get:" not in told
        and "distill@vit" not in told
        and "teacher:" not in told
    )
    assert len(before) == 33
