"""What DVC shows of a study, and what it shares."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import made
import pytest
from moto.server import ThreadedMotoServer
from smoke import ROOT, SMOKE, write_study

from equilab import dvc, study
from equilab.stages.claims import write_metrics
from equilab.tables import results

GRAPH = dvc.graph(study.read(SMOKE))


def test_a_run_has_a_handful_of_metrics_and_a_file_goes_with_its_run(tmp_path):
    runs = {"distill/get": {"fd": [4.0, 9.0]}, "gan/gdd": {"fd": [3.0]}}
    found = results(made.write_study(tmp_path, runs))
    write_metrics(found, tmp_path / "metrics")
    get = json.loads((tmp_path / "metrics/distill/get.json").read_text())
    assert get["fd_train"] == pytest.approx(6.0) and get["fd_test"] == pytest.approx(12.0)
    assert len(get) < 6 and (tmp_path / "metrics/gan/gdd.json").exists()
    shutil.rmtree(tmp_path / "results/evaluate/gdd")
    write_metrics(results(tmp_path / "results"), tmp_path / "metrics")
    assert not (tmp_path / "metrics/gan/gdd.json").exists()


def test_dvc_shows_metrics_of_runs_and_charts_of_curves_and_nothing_else():
    assert GRAPH["metrics"] == ["results/metrics"]
    for entry in GRAPH["stages"].values():
        assert not {"metrics", "plots"} & {*entry, *entry.get("do", {})}


def test_charts_are_over_images_seen_with_the_runs_of_a_stage_overlaid():
    charts = {title: chart for each in GRAPH["plots"] for title, chart in each.items()}
    assert all(chart["x"] == "nimg" for chart in charts.values())
    losses = charts["distill: loss"]["y"]
    assert {Path(path).parts[2] for path in losses} == {"get", "get-noise", "vit"}
    assert {*losses.values()} == {"loss"}
    assert {*charts["gan: fd_train"]["y"].values()} == {"fd_train"}
    assert (ROOT / f".dvc/plots/{charts['teacher: loss']['template']}.json").exists()


def test_settings_of_dvc_that_a_user_made_stay(tmp_path):
    write_study(tmp_path)
    dvc.write(tmp_path)
    settings = tmp_path / ".dvc/config"
    settings.write_text(f"{settings.read_text()}['remote \"store\"']\n    url = /store\n")
    before = settings.read_text()
    dvc.write(tmp_path)
    assert settings.read_text() == before


def call(folder, *command):
    """Run a command in a folder; return what it printed."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    named = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    settings = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "DVC_NO_ANALYTICS": "1",
        "no_proxy": "127.0.0.1",
        **keys,
        **named,
    }
    done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def address():
    """The address of a store like S3 on this machine, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/store", method="PUT"))
    yield address
    server.stop()


def shared(folder, remote):
    """Make results in a repository, push them as `remote` says, and pull them in a clone; return the two studies."""
    first, second = folder / "first", folder / "second"
    first.mkdir()
    (first / ".gitignore").write_text("results/\n.equilab/\n")
    text = SMOKE.read_text().replace("root: ../..", f"root: {ROOT}")
    (first / "params.yaml").write_text(text)
    call(first, "git", "init", "-q")
    dvc.write(first)
    for words in remote:
        call(first, "dvc", "remote", *words)
    call(first, "dvc", "repro", "data")
    call(first, "dvc", "push", "data")
    call(first, "git", "add", ".")
    call(first, "git", "commit", "-q", "-m", "study")
    call(folder, "git", "clone", "-q", "first", "second")
    call(second, "dvc", "pull", "data")
    return first, second


def content(study):
    return {path.name: path.read_bytes() for path in (study / "results/data").iterdir()}


@pytest.mark.slow
def test_results_are_shared_through_a_folder(tmp_path):
    first, second = shared(tmp_path, [["add", "--default", "store", str(tmp_path / "store")]])
    assert content(second) == content(first) and content(first)


@pytest.mark.slow
def test_results_are_shared_through_a_store_like_s3(tmp_path, address):
    remote = [
        ["add", "--default", "store", "s3://store/equilab"],
        ["modify", "store", "endpointurl", address],
    ]
    first, second = shared(tmp_path, remote)
    assert content(second) == content(first) and content(first)
