"""The last resort against a test that hangs where no signal handler can run, such as in native code.

The timeout of pytest-timeout raises an exception in the main thread. It does not help when that thread never returns to
the interpreter, nor when what hangs is the clean-up after the exception. Then this guard writes down where every thread
stands and ends the process: pytest-xdist names the test, starts another worker and goes on with the rest.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

GRACE_S = 60.0  # beyond the timeout of the test, in each of its phases
REPORTS = Path(__file__).parents[1] / "build" / "hangs"

_REPORT = pytest.StashKey[TextIO]()  # open as long as the process, so that it is no descriptor that a test left


def pytest_configure(config: pytest.Config) -> None:
    REPORTS.mkdir(parents=True, exist_ok=True)
    if not hasattr(config, "workerinput"):
        for old in _left_behind():
            old.unlink(missing_ok=True)
    config.stash[_REPORT] = (REPORTS / f"{os.getpid()}.txt").open("w", encoding="utf-8")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_REPORT].close()
    Path(config.stash[_REPORT].name).unlink()


def _left_behind() -> list[Path]:
    """Reports whose process has ended: the others are of a run beside this one."""
    return sorted(report for report in REPORTS.iterdir() if not Path("/proc", report.stem).exists())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in _left_behind():
        text = report.read_text(encoding="utf-8", errors="replace")
        if text:
            terminalreporter.section("hung")
            terminalreporter.write_line(text)


@contextmanager
def _guarded(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("timeout")
    timeout = float(marker.args[0] if marker else item.config.getini("timeout"))
    report = item.config.stash[_REPORT]
    report.write(f"{item.nodeid}\n")
    report.flush()
    faulthandler.dump_traceback_later(timeout + GRACE_S, exit=True, file=report)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        report.seek(0)
        report.truncate()


# One guard a phase: when a phase fails, pytest takes it away, since a debugger may follow.


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _guarded(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _guarded(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with _guarded(item):
        return (yield)
