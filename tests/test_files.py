"""What is kept on disk: whole files, folders of unfinished work, locks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from smoke import ROOT, write_study

from equilab import __main__
from equilab.core import config, files
from equilab.core.config import UserError
from equilab.core.job import Job, Study

IDENTITY = {"params": "a", "code": "b", "threads": "1", "versions": "torch 2", "inputs": "c"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of a study in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    shared = {"name": "t", "root": ".", "seed": 0, "threads": 1, "run_threads": 1, "device": "cpu"}
    study = config.parse(Study, shared, "study")
    return Job(study, "distill", "get", 1, (1, 8, 8), 0, "code", lambda *_: None, lambda *_: (1,))


def interrupted(job, identity):
    """Begin work and stop in the middle of it; return the folder."""
    with pytest.raises(InterruptedError), files.scratch(job, identity) as folder:
        (folder / "state").write_text("half")
        raise InterruptedError
    return folder


def test_a_job_is_named_by_its_run_and_seed(job):
    assert job.name == "distill@get-1" and job.out.as_posix() == "results/distill/get/1"


def test_unfinished_work_goes_on_and_is_removed_when_it_is_done(job, capsys):
    before = interrupted(job, IDENTITY)
    with files.scratch(job, IDENTITY) as folder:
        assert folder == before and (folder / "state").read_text() == "half"
    assert not list(folder.parent.iterdir()) and not capsys.readouterr().err


@pytest.mark.parametrize("part", IDENTITY)
def test_unfinished_work_that_cannot_go_on_says_what_differs_and_starts_anew(job, part, capsys):
    interrupted(job, IDENTITY)
    with files.scratch(job, {**IDENTITY, part: "other"}) as folder:
        assert not (folder / "state").exists()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert job.name in sentence and part in sentence
    assert not any(other in sentence for other in IDENTITY if other != part)
    assert not list(folder.parent.iterdir())


def test_finished_work_is_kept_where_it_is_wanted(job):
    with files.scratch(job, IDENTITY, keep=True) as folder:
        (folder / "shard").write_text("1")
    with files.scratch(job, IDENTITY, keep=True) as folder:
        assert (folder / "shard").exists()


def test_work_without_an_identity_begins_in_an_empty_folder(job):
    interrupted(job, None)
    with files.scratch(job) as folder:
        assert not list(folder.iterdir())


def test_a_folder_half_removed_is_not_gone_on_from(job, monkeypatch):
    """Killed while it removes what is finished: the state is still there, a snapshot no longer."""

    def killed(folder, ignore_errors):
        if folder.exists():
            raise InterruptedError

    with (
        monkeypatch.context() as patched,
        pytest.raises(InterruptedError),
        files.scratch(job, IDENTITY) as folder,
    ):
        (folder / "state").write_text("done")
        (folder / "snapshot").write_text("1")
        patched.setattr(files.shutil, "rmtree", killed)
    with files.scratch(job, IDENTITY) as folder:
        assert not (folder / "state").exists()


def test_a_folder_that_cannot_be_written_is_told(job):
    place = Path(".equilab/scratch")
    place.parent.mkdir()
    place.write_text("in the way")
    with pytest.raises(UserError, match=".equilab/scratch"), files.scratch(job, IDENTITY):
        pass


def test_a_lock_is_for_one_process_and_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.locked("distill@get-0"):
        assert "another process" in attempt("distill@get-0")
        assert not attempt("distill@get-1")
    assert not attempt("distill@get-0")


def attempt(name):
    """Return what another process is told that wants the lock."""
    script = f"from equilab.core import files\nwith files.locked({name!r}): pass"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    ).stderr


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "from equilab.core import files\nimport time\nwith files.locked('a'):\n    print(1, flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert attempt("a")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not attempt("a")


def test_a_lock_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".equilab/locks/a").mkdir(parents=True)
    with pytest.raises(UserError, match=".equilab/locks/a"), files.locked("a"):
        pass


def test_a_file_is_written_in_full_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write(path, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="a.txt"):
        files.write(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    path = tmp_path / "a.txt"
    script = f"import os, signal\nfrom pathlib import Path\nfrom equilab.core import files\nfiles.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nfiles.write(Path({str(path)!r}), 'x')"
    subprocess.run([sys.executable, "-c", script], env=environment())
    assert list(tmp_path.iterdir())
    files.write(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_text_is_written_as_utf_8_whatever_the_locale(tmp_path):
    script = "from pathlib import Path\nfrom equilab.core import files\nfiles.write(Path('a.txt'), 'gr\\u00f6\\u00dfer')"
    settings = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=settings, check=True)
    assert (tmp_path / "a.txt").read_bytes() == "größer".encode()


def file_systems():
    """Return where another file system is: simulated, and in the memory where the machine has one there."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        return ["simulated"]
    same = memory.stat().st_dev == os.stat(tempfile.gettempdir()).st_dev
    return ["simulated"] if same else ["simulated", memory]


@pytest.fixture(params=file_systems(), ids=str)
def elsewhere(request, tmp_path, monkeypatch):
    """A folder that renames and links do not lead into, as on another file system."""
    if request.param != "simulated":
        with tempfile.TemporaryDirectory(dir=request.param) as folder:
            yield Path(folder)
        return
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def within(path):
        return Path(os.path.realpath(Path(path).parent)).is_relative_to(folder)

    def guarded(call):
        def called(source, target, **options):
            if within(source) != within(target):
                raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
            return call(source, target, **options)

        return called

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    yield folder


def test_a_file_is_put_into_a_folder_of_another_file_system(tmp_path, elsewhere):
    source = tmp_path / "a"
    for content in ("new", "newer"):
        source.write_text(content)
        files.link(source, elsewhere)
        assert (elsewhere / "a").read_text() == content and source.exists()
    assert [path.name for path in elsewhere.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["results", ".equilab"])
def test_stages_write_results_onto_another_file_system(name, tmp_path, elsewhere, monkeypatch):
    monkeypatch.chdir(write_study(tmp_path / "study"))
    Path(name).symlink_to(elsewhere, target_is_directory=True)
    for _ in range(2):  # the second time in place of what is there
        assert __main__.main(["data"]) == 0
        assert {path.name for path in Path("results/data").iterdir()} == {
            "meta.json",
            *(f"{split}_{what}.npy" for split in ("train", "test") for what in ("images", "labels")),
        }


def publish(out, **contents):
    """Publish files into a results folder; return what it holds then."""
    with files.publishing(out, own="shard*") as fresh:
        for name, content in contents.items():
            (fresh / name).write_text(content)
    return content_of(out)


def content_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path):
    """A results folder with what a stage wrote, and a note of the user's."""
    folder = tmp_path / "results/get/0"
    publish(folder, weights="old", log="old", shard1="old", shard2="old")
    (folder / "note").write_text("mine")
    return folder


def test_results_take_the_place_of_the_former_ones_and_what_is_not_the_stages_stays(out):
    assert publish(out, weights="new", shard1="new") == {
        "weights": "new",
        "log": "old",
        "shard1": "new",
        "note": "mine",
    }
    assert [path.name for path in out.parent.iterdir()] == ["0"]


def test_work_that_fails_leaves_the_former_results(out):
    before = content_of(out)
    with pytest.raises(InterruptedError), files.publishing(out) as fresh:
        (fresh / "weights").write_text("new")
        assert content_of(out) == before
        raise InterruptedError
    assert content_of(out) == before and [path.name for path in out.parent.iterdir()] == ["0"]


def test_results_that_cannot_be_moved_leave_the_former_ones(out, monkeypatch):
    before, replace = content_of(out), os.replace

    def refused(source, target):
        if Path(source).name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(OSError):
        publish(out, weights="new")
    assert content_of(out) == before and [path.name for path in out.parent.iterdir()] == ["0"]


def test_what_a_process_left_that_was_killed_while_it_published_is_removed_and_nothing_lost(out):
    """Killed between its two moves: the former results are put aside, the new ones not yet there."""
    before = content_of(out)
    out.rename(out.with_name(".0.removed"))
    out.with_name(".0.new").mkdir()
    out.with_name(".0.new").joinpath("weights").write_text("half")
    assert [path.name for path in files.left_over(out.parent.parent)] == [".0.new", ".0.removed"]
    with pytest.raises(InterruptedError), files.publishing(out):
        assert content_of(out) == before
        raise InterruptedError
    assert content_of(out) == before and [path.name for path in out.parent.iterdir()] == ["0"]


def test_results_behind_a_link_are_replaced_where_they_are(out, tmp_path):
    out.rename(tmp_path / "large")
    out.symlink_to(tmp_path / "large")
    publish(out, weights="new")
    assert out.is_symlink() and (tmp_path / "large/weights").read_text() == "new"


def test_a_folder_that_results_cannot_be_written_into_is_told_before_any_work(tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match="results"), files.publishing(tmp_path / "results/data"):
        pytest.fail("it began")


def test_a_folder_in_the_place_of_a_result_is_told_before_any_work(out):
    (out / "log.csv").mkdir()
    with pytest.raises(UserError, match="log.csv"):
        files.require_replaceable([out / "weights", out / "log.csv"])


def test_a_result_that_nobody_may_change_is_told_before_any_work(out):
    changed = subprocess.run(["chattr", "+i", out / "log"], capture_output=True)
    if changed.returncode:
        pytest.skip("files cannot be made immutable here")
    try:
        with pytest.raises(UserError, match="0/log cannot be replaced"):
            files.require_replaceable([out])
    finally:
        subprocess.run(["chattr", "-i", out / "log"], check=True)
    files.require_replaceable([out])


def test_files_that_belong_together_are_written_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b/in the way").mkdir(parents=True)
    with pytest.raises(UserError, match="in the way"):
        files.write_together({tmp_path / "a": "new", tmp_path / "b/in the way": "new"})
    assert (tmp_path / "a").read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_space_is_asked_for_by_disk_and_taken_before_images_are_made(tmp_path, monkeypatch):
    half = int(0.6 * shutil.disk_usage(tmp_path).free)
    files.require_disk({tmp_path / "a": half})
    with pytest.raises(UserError, match="GiB needed"):
        files.require_disk({tmp_path / "a": half, tmp_path / "b": half})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files.new_array(tmp_path / "a.npy", np.uint8, (3, 2))
    assert np.load(tmp_path / "a.npy").tolist() == [[0, 0]] * 3
    monkeypatch.setattr(files.os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="a.npy .*No space left"):
        files.new_array(tmp_path / "a.npy", np.uint8, (3, 2))
