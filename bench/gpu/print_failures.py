"""A pytest plugin, `-p phi1.bench.gpu.print_failures`: each failure when it happens, as a run may be cut short.

pytest prints tracebacks at its end alone.
"""

from __future__ import annotations

import pytest


class PrintFailures:
    """Writes through the terminal's reporter, which is not captured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:  # a worker of pytest-xdist has none
            terminal.write_line(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PrintFailures(config))
