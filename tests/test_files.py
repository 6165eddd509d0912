"""What is kept on disk: whole files, folders of unfinished work, locks."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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


def test_a_file_is_moved_onto_another_file_system(tmp_path, elsewhere):
    source, target = tmp_path / "a", elsewhere / "b"
    for content in ("new", "newer"):
        source.write_text(content)
        files.replace(source, target)
        assert target.read_text() == content and not source.exists()
    source.write_text("linked")
    files.link(source, elsewhere)
    assert (elsewhere / "a").read_text() == "linked" and source.exists()
    assert {path.name for path in elsewhere.iterdir()} == {"a", "b"}


def test_a_folder_is_moved_onto_another_file_system_in_place_of_the_former_one(tmp_path, elsewhere):
    target = elsewhere / "b"
    for name in ("old", "new"):
        (tmp_path / "a/deep").mkdir(parents=True)
        (tmp_path / "a/deep" / name).write_text(name)
        files.replace(tmp_path / "a", target)
    assert [path.name for path in target.rglob("*")] == ["deep", "new"]
    assert [path.name for path in elsewhere.iterdir()] == ["b"] and not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_moved_leaves_the_former_one(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").write_text("old")
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "nothing", tmp_path / "b")
    assert (tmp_path / "b/old").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["b"]


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
