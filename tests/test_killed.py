"""Killed at any moment and run again with the same command: the same bytes as an uninterrupted run."""

import shutil
import signal
from pathlib import Path

import pytest
from forked import context, run, work

SMOKE = Path(__file__).parent.parent / "studies/smoke/params.yaml"
STAGES = {
    "data": ["data"],
    "teacher": ["teacher"],
    "pairs": ["pairs"],
    "distill": ["distill", "get-noise"],
    "diffusion": ["diffusion", "fpdm"],
    "features": ["features"],
    "gan": ["gan", "gdd"],
}


def content(folder):
    """Return the bytes of all results below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study run without interruption up to a distilled generator."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(SMOKE, folder)
    for command in STAGES.values():
        assert run(folder, command) == 0, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize(
    ("stage", "what", "count", "after"),
    [
        ("teacher", "noise", 31, False),
        ("teacher", "replace", 1, False),
        ("teacher", "replace", 2, True),
        ("teacher", "replace", 6, False),
        ("pairs", "noise", 6, True),
        ("pairs", "replace", 1, True),
        ("pairs", "link", 3, False),
        ("distill", "noise", 57, False),
        ("distill", "replace", 2, False),
        ("distill", "replace", 5, True),
        ("diffusion", "replace", 2, False),
        ("diffusion", "noise", 31, True),
        ("gan", "replace", 2, True),
        ("gan", "noise", 31, False),
    ],
)
def test_a_killed_stage_run_again_ends_in_the_same_bytes(whole, tmp_path, stage, what, count, after):
    shutil.copytree(whole, tmp_path / "study")
    folder = tmp_path / "study"
    shutil.rmtree(folder / "results" / stage)
    shutil.rmtree(folder / ".equilab")
    assert run(folder, STAGES[stage], what, count, after) == -signal.SIGKILL
    assert content(folder / "results" / stage) != content(whole / "results" / stage)
    assert run(folder, STAGES[stage]) == 0, (folder / "log").read_text()
    assert content(folder / "results" / stage) == content(whole / "results" / stage)
    left = [p.name for p in (folder / ".equilab/scratch").iterdir()]
    assert not left or stage == "pairs"


def test_a_killed_stage_does_not_start_from_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "study")
    folder = tmp_path / "study"
    shutil.rmtree(folder / ".equilab")
    assert (
        run(folder, ["teacher"], "replace", 2, True) == -signal.SIGKILL
    )  # right after the first state was saved
    assert run(folder, ["teacher"], "noise", 20, False) == -signal.SIGKILL  # 20 of 40 micro batches are left
    assert run(folder, ["teacher"], "noise", 22, True) == 0


def test_a_larger_set_of_pairs_adds_to_what_is_there(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "study")
    folder = tmp_path / "study"
    before = content(folder / "results/pairs")
    shutil.rmtree(folder / "results/pairs")  # as DVC does before it runs a stage
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("count: 200", "count: 320"))
    assert (
        run(folder, ["pairs"], "noise", 6, False) == 0
    )  # two shards of two blocks, and the noise's checksum
    after = content(folder / "results/pairs")
    assert len(after) == len(before) + 2
    assert all(after[name] == before[name] for name in before if name != "meta.json")


def test_a_second_process_on_the_same_run_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "study")
    folder = tmp_path / "study"
    processes = [context.Process(target=work, args=(folder, ["teacher"])) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = sorted(process.exitcode for process in processes)
    assert codes in ([0, 2], [0, 0])  # refused, or begun after the other had finished
    assert codes == [0, 0] or "another process is working on teacher" in (folder / "log").read_text()
    assert content(folder / "results/teacher") == content(whole / "results/teacher")
