"""Killed at any moment and run again with the same command: the same bytes as an uninterrupted run."""

import shutil
import signal

import pytest
from smoke import run, start, write_study

pytestmark = pytest.mark.slow

STAGES = {
    "data": ["data"],
    "teacher": ["teacher"],
    "pairs": ["pairs"],
    "distill": ["distill", "get-noise"],
    "diffusion": ["diffusion", "fpdm"],
    "features": ["features"],
    "gan": ["gan", "gdd"],
    "progressive": ["progressive", "pd-2"],
}
# The command after three words, where to die: "noise" is drawn, a file takes its place ("replace") or is linked ("link");
# after how large a share of these calls; before or after the call. Without a share it counts them.
SCRIPT = """
import os, signal
from equilab import __main__
from equilab.core import rng
what, share, after, calls, *command = sys.argv[1:]
place = {"noise": rng, "replace": os, "link": os}[what]
original, done = getattr(place, what), []
last = round(1 + float(share) * (int(calls) - 1)) if share else 0

def counted(*arguments):
    done.append(1)
    if len(done) == last and after == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments)
    if len(done) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(place, what, counted)
status = __main__.main(command)
print("calls", len(done))
sys.exit(status)
"""


def content(folder):
    """Return the bytes of all results below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study run without interruption up to trained generators of all kinds."""
    folder = write_study(tmp_path_factory.mktemp("finished"))
    for command in STAGES.values():
        status, _, err = run(folder, *command)
        assert status == 0, err
    return folder


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the study, without what is unfinished."""
    shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(tmp_path / "study/.equilab")
    return tmp_path / "study"


def calls_of(study, stage, what):
    """Return how often a whole run of a stage without results does something; its results are as before."""
    shutil.rmtree(study / "results" / stage)
    status, out, err = run(study, what, "", "", "0", *STAGES[stage], script=SCRIPT)
    assert status == 0, err
    shutil.rmtree(study / ".equilab")
    return out.split()[-1]


@pytest.mark.parametrize(
    ("stage", "what", "share", "after"),
    [
        ("teacher", "noise", 0.8, "before"),
        ("teacher", "replace", 0.0, "after"),
        ("teacher", "replace", 0.3, "before"),
        ("teacher", "replace", 0.7, "after"),
        ("teacher", "replace", 1.0, "after"),
        ("pairs", "noise", 0.7, "after"),
        ("pairs", "replace", 0.3, "after"),
        ("pairs", "link", 0.7, "before"),
        ("distill", "noise", 0.6, "before"),
        ("distill", "replace", 0.4, "before"),
        ("distill", "replace", 0.9, "after"),
        ("diffusion", "replace", 0.4, "before"),
        ("diffusion", "noise", 0.7, "after"),
        ("gan", "replace", 0.4, "after"),
        ("gan", "noise", 0.7, "before"),
        ("progressive", "replace", 0.4, "before"),
    ],
)
def test_a_killed_stage_run_again_ends_in_the_same_bytes(finished, study, stage, what, share, after):
    calls = calls_of(study, stage, what)
    shutil.rmtree(study / "results" / stage)
    assert run(study, what, str(share), after, calls, *STAGES[stage], script=SCRIPT)[0] == -signal.SIGKILL
    status, _, err = run(study, *STAGES[stage])
    assert status == 0, err
    assert content(study / "results" / stage) == content(finished / "results" / stage)
    kept = [path.name for path in (study / ".equilab/scratch").iterdir() if not path.name.startswith(".")]
    assert kept == (["pairs"] if stage == "pairs" else [])


def test_a_killed_stage_does_not_start_from_nothing(study):
    calls = int(calls_of(study, "teacher", "noise"))
    assert (
        run(study, "noise", "0.8", "before", str(calls), *STAGES["teacher"], script=SCRIPT)[0]
        == -signal.SIGKILL
    )
    status, out, err = run(study, "noise", "", "", "0", *STAGES["teacher"], script=SCRIPT)
    assert status == 0 and int(out.split()[-1]) < 0.6 * calls, err


def test_a_killed_stage_that_cannot_go_on_says_why(study):
    calls = calls_of(study, "teacher", "noise")
    assert (
        run(study, "noise", "0.8", "before", calls, *STAGES["teacher"], script=SCRIPT)[0] == -signal.SIGKILL
    )
    write_study(study, {"study.threads": 2, "teacher.sigma_mean": -1.0})
    status, _, err = run(study, *STAGES["teacher"])
    assert status == 0
    (sentence,) = [line for line in err.splitlines() if "teacher: unfinished" in line]
    assert "params" in sentence and "threads" in sentence and "code" not in sentence


def test_a_larger_set_of_pairs_adds_to_what_is_there(study):
    calls = int(calls_of_pairs(study, 200))
    before = content(study / "results/pairs")
    shutil.rmtree(study / "results/pairs")  # as DVC does before it runs a stage
    assert int(calls_of_pairs(study, 320)) < calls
    after = content(study / "results/pairs")
    assert len(after) == len(before) + 2
    assert all(after[name] == before[name] for name in before if name != "meta.json")


def calls_of_pairs(study, count):
    """Return how often noise is drawn to make so many pairs."""
    write_study(study, {"pairs.count": count})
    status, out, err = run(study, "noise", "", "", "0", *STAGES["pairs"], script=SCRIPT)
    assert status == 0, err
    return out.split()[-1]


def test_a_second_process_on_the_same_run_is_refused(finished, study):
    processes = [start(study, *STAGES["teacher"]) for _ in range(2)]
    told = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes in ([0, 2], [0, 0])  # refused, or begun after the other had finished
    assert codes == [0, 0] or any("another process" in err and "teacher" in err for err in told)
    assert content(study / "results/teacher") == content(finished / "results/teacher")
