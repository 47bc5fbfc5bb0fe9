"""A line while a user waits."""

from __future__ import annotations

import io
import logging
import threading
from contextlib import redirect_stderr

import pytest

from rewriter import progress


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(progress, "DELAY", 0.02)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def wait(seconds: float = 0.4) -> None:
    threading.Event().wait(seconds)


def test_shown_after_a_while(terminal: Terminal) -> None:
    with redirect_stderr(terminal), progress.shown("compiling penalty, 512 operators"):
        wait()
    assert "optimize_nested: compiling penalty, 512 operators … 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # erased


def test_quick_work_says_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 60)
    with redirect_stderr(terminal), progress.shown("compiling penalty"):
        wait(0.1)
    assert terminal.getvalue() == ""


def test_switched_off(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "0")
    with redirect_stderr(terminal), progress.shown("compiling penalty"):
        wait(0.1)
    assert terminal.getvalue() == ""


def test_one_line_at_a_time(terminal: Terminal) -> None:
    with redirect_stderr(terminal), progress.shown("outer"):
        wait()
        with progress.shown("inner"):
            wait()
    assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()


def test_an_error_erases_the_line(terminal: Terminal) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        redirect_stderr(terminal),
        progress.shown("compiling penalty"),
    ):
        wait()
        raise ZeroDivisionError
    assert terminal.getvalue().endswith("\x1b[2K")


def test_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The logger is told, nothing is written."""
    monkeypatch.setattr(progress, "DELAY", 0.02)
    with caplog.at_level(logging.INFO, "optimize_nested"), progress.shown("compiling penalty"):
        wait(0.1)
    assert [r.getMessage() for r in caplog.records] == ["compiling penalty took 0.1 s"]
    assert capsys.readouterr().err == ""
