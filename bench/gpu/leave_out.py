"""A pytest plugin, `-p phi1.bench.gpu.leave_out`: on a machine that lacks packages, tests that import them do not fail.

They are skipped, whether a file, a fixture, a test or a process that it starts imports what is not installed; a line
for each package names them at the end.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from phi1.bench.gpu.commands import LEFT_OUT

Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)
_REASON = re.compile(r"Skipped: (.+) is not installed")


def absent(text: str) -> str:
    """The package that a traceback says is missing, and is; "" if none."""
    names = (name.partition(".")[0] for name in re.findall(r"No module named '([\w.]+)'", text))
    return next((name for name in names if importlib.util.find_spec(name) is None), "")


def _leave_out(report: Report) -> Report:
    if report.failed and (package := absent(report.longreprtext)):
        report.outcome = "skipped"
        report.longrepr = (report.nodeid, 0, f"Skipped: {package} is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _leave_out((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _leave_out((yield))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        if match := _REASON.fullmatch(report.longrepr[2]):
            path, _, test = report.nodeid.partition("::")
            files.setdefault(match[1], Counter())[Path(path).name] += bool(test)
    for package, counts in sorted(files.items()):
        names = (f"{tests} of {name}" if tests else name for name, tests in sorted(counts.items()))
        terminalreporter.write_line(f"{LEFT_OUT}as {package} is not installed: {', '.join(names)}")
