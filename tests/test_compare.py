"""`compare`: whether results are those that are committed, on this machine or on another."""

import json
import subprocess

import made
import pandas as pd
import pytest
from smoke import refused

from equilab import __main__

RUNS = {
    "distill/get": {"fd": [10.0, 11.0, 12.0]},
    "distill/vit": {"fd": [5.0, 5.5, 6.0]},
    "gan/gdd": {"fd": [3.0]},
}
CLAIM = {"id": "X-1", "part": "", "claim": "one", "verdict": "holds", "effect": 2.0, "seeds": "3"}


def write(folder, runs=RUNS, verdict="holds", environment=None):
    about = {"torch": "2", "numpy": "2", "device": "cpu AVX2", "threads": 1, "processes": 1}
    about |= environment or {}
    runs = {of: {"summary": {"environment": about}, **run} for of, run in runs.items()}
    results = made.write_study(folder, runs)
    claims = pd.DataFrame([{**CLAIM, "verdict": verdict, "published": "", "where": ""}])
    (results / "claims").mkdir(exist_ok=True)
    claims.to_csv(results / "claims/x.csv", index=False)


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A study whose results are committed, current folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "results"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def compared(capsys, *arguments):
    capsys.readouterr()
    status = __main__.main(["compare", *arguments])
    return status, capsys.readouterr().out


def test_the_same_results_are_reproduced(committed, capsys):
    status, page = compared(capsys)
    assert status == 0 and page.rstrip().endswith("\nreproduced") and "3 same" in page


def test_on_another_machine_scores_may_differ_as_seeds_do_and_machines_are_named(committed, capsys):
    other = {of: {**run, "fd": [value * 1.05 for value in run["fd"]]} for of, run in RUNS.items()}
    write(committed, other, environment={"device": "cpu AVX512"})
    status, page = compared(capsys)
    assert status == 0 and "within tolerance" in page
    assert "cpu AVX2" in page and "cpu AVX512" in page


def test_on_the_same_machine_every_score_has_to_be_the_same(committed, capsys):
    write(committed, {**RUNS, "gan/gdd": {"fd": [3.001]}})
    status, page = compared(capsys)
    assert status == 1 and page.rstrip().endswith("not reproduced")
    assert "gan/gdd" in page and "distill/get " not in page.replace("|", " ")


def test_a_score_far_away_and_another_verdict_are_told_with_what_differs(committed, capsys):
    far = {**RUNS, "distill/vit": {"fd": [50.0, 55.0, 60.0], "config": {"optimisation": {"lr": 0.2}}}}
    write(committed, far, verdict="fails", environment={"device": "cpu AVX512"})
    status, page = compared(capsys, "HEAD")
    assert status == 1
    assert "optimisation.lr 0.1, here 0.2" in page or "params: optimisation" in page
    assert "holds" in page and "fails" in page and "X-1" in page


def test_a_run_that_is_not_there_is_told(committed, capsys):
    import shutil

    shutil.rmtree(committed / "results/evaluate/gdd")
    status, page = compared(capsys)
    assert status == 1 and "not run here" in page


def test_what_is_not_in_git_is_told(committed, capsys, monkeypatch):
    assert "nowhere" in refused(capsys, "compare", "nowhere")
    (committed / "other").mkdir()
    monkeypatch.chdir(committed / "other")
    assert "git has no results" in refused(capsys, "compare")


def test_results_without_an_environment_are_compared(committed, capsys):
    for path in (committed / "results").rglob("summary.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in summary.items() if key != "environment"}))
    assert compared(capsys)[0] == 0
