"""A study's graph on this machine and on SLURM: what needs what, what is done, what is interrupted and goes on."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import slurm
import smoke
from smoke import write_study
from test_killed import content

from equilab import dvc, study
from equilab.cluster import done, local, worker
from equilab.cluster.resources import Resources, check, torchrun_options
from equilab.cluster.slurm import scripts
from equilab.cluster.tasks import asked, tasks_of
from equilab.core.config import UserError

RESOURCES = {"default": {"gpus": 0, "cpus": 1, "memory": 0.5, "hours": 1}}
GETS = ["distill@get-0", "distill@get-1"]
LONG = {"distill.get.optimisation.nimg": 16_000, "resources": RESOURCES}  # time to be interrupted in


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """A study of which nothing is done yet."""
    monkeypatch.chdir(write_study(tmp_path))
    return study.read(Path("params.yaml"))


def test_a_job_needs_what_dvc_says_its_stage_depends_on(sections):
    tasks = tasks_of(sections)
    assert tasks["pairs"].needs == ("teacher",)
    assert tasks["distill@get-1"].needs == ("pairs",)
    assert tasks["progressive@pd-1-0"].needs == ("data", "progressive@pd-2-0")
    assert "distill@get-1" in tasks["evaluate@get-1"].needs
    assert "distill@get-0" not in tasks["evaluate@get-1"].needs
    order = list(tasks)
    for name, entry in dvc.graph(sections)["stages"].items():
        assert name == "code" or any(name in (task.stage, task.name) for task in tasks.values()), entry
    for name, task in tasks.items():
        assert all(order.index(need) < order.index(name) for need in task.needs)


def test_what_is_asked_for_comes_with_what_it_needs(sections):
    tasks = tasks_of(sections)
    assert set(asked(tasks, ["distill@get-1"])) == {"data", "teacher", "pairs", "distill@get-1"}
    assert set(asked(tasks, ["pairs", "features"])) == {"data", "teacher", "pairs", "features"}
    with pytest.raises(UserError, match="'distil'.*did you mean"):
        asked(tasks, ["distil"])


def make(task):
    """Write something as the results of a job."""
    for path in task.outputs:
        file = path if path.suffix else path / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(task.name)


def test_a_job_is_done_as_long_as_nothing_that_it_is_made_from_or_made_changes(sections):
    tasks = tasks_of(sections)
    for name in ("data", "teacher", "pairs"):
        assert not done.is_done(sections, tasks[name])
        before = done.made_from(sections, tasks[name])
        make(tasks[name])
        done.record(tasks[name], before)
        assert done.is_done(sections, tasks[name])
    weights = Path("results/teacher/weights.safetensors")
    weights.write_text("other")
    assert not done.is_done(sections, tasks["teacher"]) and done.is_done(sections, tasks["pairs"])
    done.record(tasks["teacher"], done.made_from(sections, tasks["teacher"]))
    assert done.is_done(sections, tasks["teacher"]) and not done.is_done(sections, tasks["pairs"])
    write_study(Path(), {"data.test": 100})
    changed = study.read(Path("params.yaml"))
    assert not done.is_done(changed, tasks["data"])


def test_what_dvc_holds_to_be_up_to_date_is_done_and_nothing_else(sections, monkeypatch):
    tasks = asked(tasks_of(sections), ["pairs"])
    for name in ("data", "teacher"):
        make(tasks[name])
    status = subprocess.CompletedProcess([], 0, stdout='{"teacher": ["changed"]}', stderr="")
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", lambda *_, **__: status)  # what DVC says
        done.adopt(sections, tasks)
    assert [name for name, task in tasks.items() if done.is_done(sections, task)] == ["data"]
    make(tasks["pairs"])
    done.record(tasks["pairs"], done.made_from(sections, tasks["pairs"]))
    done.record(tasks["teacher"], done.made_from(sections, tasks["teacher"]))  # the same bytes
    assert done.is_done(sections, tasks["pairs"])


@pytest.fixture
def here(monkeypatch):
    """Run programs in place of jobs; give how many ran at a time, the order of their ends, and who fails."""
    facts = {"running": 0, "most": 0, "began": [], "fail": set(), "environment": {}}

    class Process:
        def __init__(self, task):
            self.task, self.polls, self.status = task, 0, None
            facts["began"].append(task.name)
            facts["running"] += 1
            facts["most"] = max(facts["most"], facts["running"])

        @property
        def exitcode(self):
            self.polls += 1
            if self.status is None and self.polls > 2:
                facts["running"] -= 1
                self.status = int(self.task.name in facts["fail"])
                if not self.status:
                    make(self.task)
            return self.status

    def start(task, torchrun, environment, imported):
        facts["environment"][task.name] = environment
        return Process(task)

    monkeypatch.setattr(local, "start", start)
    return facts


def test_jobs_run_as_soon_as_what_they_need_is_done(sections, here):
    tasks = asked(tasks_of(sections), ["evaluate@get-1", "evaluate@vit-0"])
    assert local.run(sections, tasks, 2) == []
    assert sorted(here["began"]) == sorted(tasks)
    assert here["most"] <= 2
    for name, task in tasks.items():
        assert all(here["began"].index(need) < here["began"].index(name) for need in task.needs)
    here["began"].clear()
    assert local.run(sections, tasks, 2) == [] and here["began"] == []


def test_a_job_that_fails_ends_what_needs_it_and_nothing_else(sections, here):
    here["fail"] = {"distill@get-1"}
    tasks = asked(tasks_of(sections), ["evaluate@get-1", "evaluate@vit-0"])
    failed, skipped = local.run(sections, tasks, 2)
    assert "distill@get-1 failed with status 1" in failed and str(worker.LOGS) in failed
    assert skipped.startswith("evaluate@get-1: not run")
    assert "evaluate@vit-0" in here["began"]
    here["began"].clear()
    here["fail"] = set()
    assert local.run(sections, tasks, 2) == []
    assert here["began"] == ["distill@get-1", "evaluate@get-1"]


def test_a_job_whose_log_cannot_be_written_ends_what_needs_it_and_nothing_else(sections, monkeypatch):
    monkeypatch.setattr(done, "is_done", lambda _, task: task.stage != "distill" and task.stage != "evaluate")
    tasks = asked(tasks_of(sections), ["evaluate@get-1", "distill@get-0"])
    for name in ("distill@get-0", "distill@get-1"):
        (worker.LOGS / f"{name}.log").mkdir(parents=True)
    first, second, skipped = local.run(sections, tasks, 2)
    for sentence, name in zip(sorted((first, second)), ("distill@get-0", "distill@get-1")):
        assert sentence.startswith(f"{name}: ") and f"{name}.log" in sentence
    assert "evaluate@get-1" in skipped


def test_each_run_has_a_gpu_of_its_own(sections, here, monkeypatch):
    monkeypatch.setattr(local, "this_machine", lambda *_: local.Machine(8, ["3", "5"], 8))
    tasks = asked(tasks_of(sections), ["distill"])
    assert local.run(sections, tasks, None) == []
    assert here["most"] == 2
    assert {each["CUDA_VISIBLE_DEVICES"] for each in here["environment"].values()} == {"3", "5"}


def test_several_gpus_are_processes_of_a_job_that_is_shared(sections):
    machine = local.Machine(8, ["0", "1", "2", "3"], 8)
    sections.values["resources"] = {"default": RESOURCES["default"], "distill": {"gpus": 2}}
    tasks = tasks_of(sections)
    assert local.share_of(sections, tasks["distill@get-0"], machine) == local.Share(2, 2, ["0", "1"])
    assert local.share_of(sections, tasks["cost"], machine).cores == 8  # it measures: nothing runs beside it


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"default": {"gpus": 0, "cpus": 1, "memory": 1}}, "resources.default.hours"),
        ({**RESOURCES, "distil": {}}, "'distil'"),
        ({**RESOURCES, "distill": {"gpu": 1}}, "resources.distill.gpu"),
        ({**RESOURCES, "data": {"nodes": 2}}, "resources.data"),
        ({**RESOURCES, "distill": {"partition": "a\nrm -rf"}}, "resources.distill.partition"),
        ({**RESOURCES, "distill": {"hours": 0}}, "resources.distill.hours"),
    ],
)
def test_resources_are_checked(sections, resources, said):
    sections.values["resources"] = resources
    with pytest.raises(UserError, match=said):
        check(sections)


def test_slurm_needs_to_know_what_jobs_take(sections):
    with pytest.raises(UserError, match="resources.default"):
        next(scripts(sections, tasks_of(sections)))


def test_a_dry_run_prints_the_scripts(sections):
    pytest.importorskip("submitit")
    sections.values["resources"] = {
        **RESOURCES,
        "distill": {"gpus": 4, "nodes": 2, "hours": 2.5, "partition": "large"},
    }
    texts = list(scripts(sections, asked(tasks_of(sections), ["distill"])))
    (gets,) = [each for each in texts if "--job-name=smoke:distill" in each]
    lines = {line.removeprefix("#SBATCH --") for line in gets.splitlines()}
    assert {"gpus-per-node=4", "nodes=2", "time=150", "partition=large", "requeue"} <= lines
    assert "array=0-3%4" in lines and "dependency='afterok:<pairs>'" in lines


def test_processes_of_several_nodes_meet_at_the_first():
    resources = Resources(gpus=8, cpus=8, memory=1.0, hours=1.0, nodes=2)
    options = " ".join(torchrun_options(resources, "17_3", 1, "first"))
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr first" in options
    assert torchrun_options(resources.model_copy(update={"nodes": 1}), "17", 0, "x")[0] == "--standalone"


def submit(folder, *arguments):
    """Run `submit` as a process of its own; return what it printed."""
    status, out, err = smoke.run(folder, "submit", *arguments)
    assert status == 0, err
    return out


def results(folder):
    return content(folder / "results/distill")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The study's runs of GET, made on this machine without interruption."""
    folder = write_study(tmp_path_factory.mktemp("here") / "study", LONG)
    assert "dvc commit" in submit(folder, *GETS)
    return folder


@pytest.mark.slow
def test_a_job_has_the_processes_that_it_was_given_whatever_study_launch_says(tmp_path):
    short = {f"evaluator.optimisation.{key}": 32 for key in ("nimg", "batch", "micro_batch", "report_nimg")}
    two = {"study.launch": "torchrun --standalone --nproc-per-node 2 -m equilab"}
    folder = write_study(tmp_path / "study", {**short, **two})
    submit(folder, "evaluator")
    made = json.loads((folder / "results/evaluator/summary.json").read_text())
    assert made["environment"]["processes"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("imported", (False, True))
def test_a_job_is_a_process_with_a_log_and_how_it_ended_is_told(sections, imported):
    task = tasks_of(sections)["data"]

    def ended(by=None):
        process = worker.start(task, imported=imported)
        if by:
            os.kill(process.pid, by)
        process.join()
        return process.exitcode

    assert ended() == 0 and Path("results/data/meta.json").exists()
    assert ended(by=signal.SIGKILL) == -signal.SIGKILL
    assert "signal 9" in worker.failure(task, -signal.SIGKILL)
    write_study(Path(), {"data.path": "nowhere"})
    assert ended() == 2
    assert "data: source digits reads test" in worker.failure(task, 2)
    assert worker.log_of(task).read_text().count("$ python -m equilab data --alone") == 3


@pytest.mark.slow
def test_a_local_run_that_is_stopped_goes_on_and_is_done_once(uninterrupted, tmp_path):
    folder = write_study(tmp_path / "study", LONG)
    process = smoke.start(folder, "submit", *GETS)
    slurm.wait(lambda: any((folder / ".equilab/scratch").glob("distill@get-*/state.safetensors")))
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    submit(folder, *GETS)
    assert results(folder) == results(uninterrupted)
    assert "is done" in submit(folder, *GETS)
    assert (folder / ".equilab/logs/pairs.log").read_text().count("$ ") == 1


@pytest.mark.slow
def test_the_jobs_of_a_local_run_that_is_killed_end_and_go_on_in_the_next(uninterrupted, tmp_path):
    folder = write_study(tmp_path / "study", LONG)
    process = smoke.start(folder, "submit", *GETS)
    slurm.wait(lambda: any((folder / ".equilab/scratch").glob("distill@get-*/state.safetensors")))
    process.kill()
    process.wait()
    time.sleep(5)  # a job looks every second whether it is still wanted
    submit(folder, *GETS)  # which would refuse a job that another process works on
    assert results(folder) == results(uninterrupted)


def needs_slurm(test):
    reason = f"SLURM is not installed: no {', '.join(slurm.missing())}"
    return pytest.mark.slow(pytest.mark.skipif(bool(slurm.missing()), reason=reason)(test))


@needs_slurm
def test_runs_on_slurm_that_are_cancelled_and_requeued_end_in_the_same_bytes(uninterrupted, tmp_path):
    folder = write_study(tmp_path / "study", LONG)
    (tmp_path / "slurm").mkdir()
    with slurm.running(tmp_path / "slurm"):
        out = submit(folder, *GETS, "--cluster", "slurm")
        assert "dvc commit" in out
        numbers = {
            name: number for number, name in (line.split("\t") for line in out.splitlines() if "\t" in line)
        }
        first, second = (numbers[name] for name in GETS)
        assert first.partition("_")[0] == second.partition("_")[0]  # alike: an array
        for name in GETS:
            slurm.wait((folder / f".equilab/scratch/{name}/state.safetensors").exists, 900)
        slurm.told("scancel", "--signal", "USR2", first)  # as before its time is over: it requeues itself
        slurm.told("scancel", second)
        slurm.wait(lambda: slurm.states()[second] == "CANCELLED")
        assert not list((folder / "results/distill").rglob("weights.safetensors"))
        slurm.told("scontrol", "requeue", second)
        slurm.wait(lambda: all(slurm.states()[number] == "COMPLETED" for number in (first, second)), 900)
        for number in (first, second):
            assert "Restarts=1" in slurm.told("scontrol", "show", "job", number)
        assert results(folder) == results(uninterrupted)
        assert "is done" in submit(folder, *GETS, "--cluster", "slurm")


@needs_slurm
def test_a_run_on_two_nodes_has_the_bytes_of_two_processes_here(tmp_path):
    resources = {**RESOURCES, "distill": {"nodes": 2, "processes": 1}}
    folder = write_study(tmp_path / "study", {"resources": resources})
    (tmp_path / "slurm").mkdir()
    with slurm.running(tmp_path / "slurm"):
        out = submit(folder, "distill@vit-0", "--cluster", "slurm")
        (last,) = [line.split("\t")[0] for line in out.splitlines() if line.endswith("distill@vit-0")]
        slurm.finished(last)
    there = results(folder)
    assert b'"processes": 2' in there["vit/0/summary.json"]
    shutil.rmtree(folder / "results/distill")
    two = "torchrun --standalone --nproc-per-node 2 -m equilab"
    write_study(folder, {"study.launch": two})
    status, _, err = smoke.run(folder, "distill", "vit")
    assert status == 0, err
    assert results(folder) == there
