import io
from typing import Any

import pytest

from benchmarking.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_terminal_has_one_line_that_is_written_anew(monkeypatch: Any) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(Clock())

    progress.report("epoch 1 of 2")
    progress.report("epoch 2 of 2")
    progress.clear()

    parts = terminal.getvalue().split("\r\x1b[K")
    assert [part.strip() for part in parts] == ["", "epoch 1 of 2", "epoch 2 of 2", ""]
    assert "\n" not in terminal.getvalue()


def test_a_file_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(clock, every_s=10.0)

    for _ in range(25):
        clock.now_s += 1.0
        progress.report(f"at {clock.now_s:.0f} s")
    progress.clear()

    assert capsys.readouterr().err == "   at 110 s\n   at 120 s\n"
