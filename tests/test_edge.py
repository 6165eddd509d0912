"""Whatever happens within a command: an exit status and sentences, never a traceback."""

from pathlib import Path

import pytest

from equilab import __main__
from equilab.core import edge, files
from equilab.core.config import UserError


def answered(capsys, command, words=("distill", "get")):
    status = edge.answered(command, words)
    return status, capsys.readouterr().err.splitlines()


def failing(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("study", [True, False])
def test_what_nobody_foresaw_is_one_sentence_that_names_the_file_in_hand_and_the_log(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edge.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    if study:
        Path("params.yaml").touch()
    status, (sentence,) = answered(capsys, lambda: files.write(Path("a.json"), "\ud800"))
    (log,) = tmp_path.rglob("*.log")
    assert status == 1 and str(log.relative_to(tmp_path)) in sentence
    assert all(words in sentence for words in ("distill get", "UnicodeEncodeError", "a.json"))
    assert "Traceback" in log.read_text() and (".equilab" in log.parts) == study


def test_what_a_user_can_mend_is_told_without_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mistakes = failing(UserError("a: one\nb: two"))
    assert answered(capsys, mistakes) == (2, ["equilab: a: one", "equilab: b: two"])
    status, (sentence,) = answered(capsys, failing(OSError(28, "No space left on device", "results/a")))
    assert status == 2 and "results/a: No space left" in sentence
    assert answered(capsys, lambda: None) == (0, []) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "results/a"), OSError(5, "I/O", "results/a")]
)
def test_of_a_file_too_what_nobody_foresaw_has_a_log(error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").touch()
    status, (sentence,) = answered(capsys, failing(error))
    (log,) = Path(".equilab").rglob("*.log")
    assert status == 1 and "results/a" in sentence and str(log) in sentence
    assert type(error).__name__ in log.read_text()


def test_a_log_that_cannot_be_written_is_told_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").touch()
    Path(".equilab").touch()
    status, told = answered(capsys, failing(KeyError("x")))
    assert status == 1 and any("Traceback" in line for line in told) and "KeyError" in told[-1]


def test_every_command_has_the_edge(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edge.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setitem(__main__.COMMANDS, "check", lambda given: failing(KeyError("unforeseen"))())
    assert __main__.main(["check"]) == 1 and "unforeseen" in capsys.readouterr().err
