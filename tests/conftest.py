"""What holds for every test: a C extension that fits its sources, ``--long``, and the record of results
that tools/test adds up."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project beside pytest's own."""
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption("--results", metavar="FILE", help="write what became of each test to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test an extension that is missing or stale, and start the record."""
    try:
        import ring.build  # noqa: F401
    except ImportError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    # With pytest-xdist all reports come to the first process, which is no worker.
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(config.getoption("--results"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests out (not: skip them) unless asked for."""
    if config.getoption("--long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


class Record:
    """Collects what became of each test, as pytest itself counts, and writes it at the end.

    The file: ``{"passed": n, "failed": [node id, ...], "skipped": [[node id, reason], ...]}``. An error in
    collection, setup or teardown is a failure. A test that fails as expected is a skip with its reason.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed: set[str] = set()
        self._failed: dict[str, None] = {}
        self._skipped: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A whole module may fail or be skipped before it has tests."""
        if report.failed:
            self._failed[report.nodeid] = None
        elif report.skipped:
            self._skipped[report.nodeid] = _reason(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Three reports come for each test: setup, call, teardown."""
        if report.failed:
            self._failed[report.nodeid] = None
        elif report.skipped:
            self._skipped[report.nodeid] = _reason(report)
        elif report.when == "call":
            self._passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the record. A test that passed and then failed in its teardown did not pass."""
        self._file.write_text(json.dumps({
            "passed": len(self._passed - self._failed.keys()),
            "failed": list(self._failed),
            "skipped": list(self._skipped.items()),
        }))


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"fails as expected: {report.wasxfail}"
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)
