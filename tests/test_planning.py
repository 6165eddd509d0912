"""What a study takes, before anything runs and when part of it is done."""

import json
import re

import pytest
import yaml
from smoke import write_study

from equilab import __main__, planning, study
from equilab.core.job import Job
from equilab.study import Replicate, job_of

PEAK = 1e9  # FLOP/s
ABSENT = [
    "features",
    "gan",
    "diffusion",
    "relative",
    "activation",
    "cost",
    "evaluate",
]  # which take time to plan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a study of which nothing is done, on a machine of a known speed."""
    from equilab.metrics import measuring

    monkeypatch.setattr(measuring, "matmul_peak", lambda device, dtype, longest: PEAK)
    folder = write_study(tmp_path, dict.fromkeys(ABSENT, ...))
    monkeypatch.chdir(folder)
    return folder


def lines(capsys, *arguments):
    """Return the rows of the table that `plan` prints, by stage."""
    assert __main__.main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[1:]}, printed


def left(capsys):
    """Return how many of the jobs of `distill` are left."""
    return int(lines(capsys)[0]["distill"]["left"])


def sections():
    return study.read(planning.Path("params.yaml"))


def jobs_of(stage) -> list[Job]:
    return [job_of(sections(), stage, each) for each in sections().jobs(stage)]


def finish(job, **summary):
    """Write what a training leaves."""
    (job.out / "snapshots").mkdir(parents=True)
    for name in ("weights.safetensors", "log.csv"):
        (job.out / name).write_text("")
    (job.out / "summary.json").write_text(json.dumps(summary))


def test_every_stage_is_told_with_its_jobs_and_what_they_take(folder, capsys):
    table, printed = lines(capsys)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    assert list(table) == [*(stage for stage in planning.STAGES if stage in params), "all"]
    pairs = params["pairs"]["count"] + params["pairs"]["held_out"]
    steps = params["pairs"]["sampler"]["steps"]
    assert table["pairs"]["images"] == str(pairs)
    assert table["pairs"]["teacher evaluations"] == planning.short(pairs * (2 * steps - 1))
    seen = sum(params["consistency"][run]["optimisation"]["nimg"] for run in params["consistency"])
    assert table["consistency"]["teacher evaluations"] == planning.short(2 * seen)
    assert table["distill"]["teacher evaluations"] == "", "those of pairs are counted once"
    runs = params["distill"].values()
    assert table["distill"]["jobs"] == str(sum(len(run["seeds"]) for run in runs)), (
        "replicates are counted each"
    )
    seen = sum(len(run["seeds"]) * run["optimisation"]["nimg"] for run in runs)
    assert table["distill"]["images"] == planning.short(seen)
    for row in table.values():
        assert row["left"] == row["jobs"] and row["time left"] == row["time"]
    assert int(table["all"]["jobs"]) == sum(int(row["jobs"]) for name, row in table.items() if name != "all")
    assert "activations" in printed and "not counted" in printed
    assert [path.name for path in folder.iterdir()] == ["params.yaml"], "nothing is written"


def test_a_study_is_named_by_its_folder_or_by_its_params(folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "planned", lambda sections: sections.folder)
    for arguments in ([folder.name], ["--params", f"{folder.name}/params.yaml"]):
        monkeypatch.chdir(folder.parent)
        assert __main__.main(["plan", *arguments]) == 0
        assert capsys.readouterr().out.strip() == str(folder)


def test_what_is_done_as_params_say_is_not_left(folder, capsys):
    from equilab.core.config import plain

    first, second, *others = jobs_of("distill")
    config = plain(first.read("distill", first.run, first.seed))
    finish(first, config=config)
    assert left(capsys) == 1 + len(others)
    finish(second, config={**config, "loss": "another"})
    assert left(capsys) == 1 + len(others)
    (first.out / "weights.safetensors").unlink()
    assert left(capsys) == 2 + len(others)


def test_of_a_training_that_has_begun_the_rest_is_left(folder, capsys, monkeypatch):
    import torch

    from equilab.core.config import plain
    from equilab.models.checkpoint import save_tensors

    monkeypatch.setattr(planning, "duration", str)  # in seconds

    def done():
        """Return how many seconds of `distill` are not left."""
        row = lines(capsys)[0]["distill"]
        return float(row["time"]) - float(row["time left"])

    job = jobs_of("distill")[0]
    config = job.read("distill", job.run, job.seed)
    nimg = config.optimisation.nimg
    state = folder / ".equilab/scratch" / job.name / "state.safetensors"
    save_tensors(state, {"a": torch.zeros(1)}, {"nimg": nimg // 4})
    quarter = done()
    finish(job, config=plain(config))
    assert quarter == pytest.approx(0.25 * done(), rel=0.1)


def test_a_stage_that_cannot_be_planned_is_named_and_the_others_are_told(folder, capsys):
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("count: ", "count: -", 1))
    table, printed = lines(capsys)
    assert "pairs" not in table and "teacher" in table
    assert re.search(r"pairs is not counted: .*pairs\.count", printed)


def test_time_is_that_of_the_flops_at_the_share_that_runs_reach(folder):
    job = jobs_of("distill")[0]
    of = f"distill/{job.run}"
    usual = planning.speed_of(job)
    assert usual.seconds(PEAK, job) == pytest.approx(planning.START + 1 / planning.USUAL_SHARE)
    from equilab.core.machine import environment

    cost = folder / "results/cost"
    cost.mkdir(parents=True)
    rows = [f"{of},train,True,0.5", f"{of},train,False,0.1", "teacher,sample,,0.2"]
    (cost / "cost.csv").write_text("\n".join(["of,what,as_trained,peak_share", *rows, ""]))
    (cost / "cost.json").write_text(json.dumps({"environment": environment(job)}))
    speed = planning.speed_of(job)
    assert speed.seconds(PEAK, job) == pytest.approx(planning.START + 1 / 0.5)
    other = job_of(sections(), "data", Replicate())
    assert speed.seconds(PEAK, other) == pytest.approx(planning.START + 1 / 0.2)
    (cost / "cost.csv").write_text("of,what,peak_share\nteacher,call,0.2\n")  # no training step was measured
    assert planning.speed_of(job).seconds(PEAK, job) == pytest.approx(planning.START + 1 / 0.2)
    (cost / "cost.json").write_text(json.dumps({"environment": {"device": "another"}}))
    assert planning.speed_of(job) == usual


@pytest.mark.parametrize(
    ("seconds", "words"), [(90, "1.5 min"), (7200, "2.0 h"), (3 * 86400, "3.0 days"), (1e9, "31.7 years")]
)
def test_time_in_words(seconds, words):
    assert planning.duration(seconds) == words
