"""What holds for every test: a C extension that fits its sources, ``--long`` and ``--rows``, the record of
results that tools/test and tools/conformance add up, both engines, and a daemon that has to be left as it was."""

import json
import os
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import hypothesis
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project beside pytest's own."""
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption("--rows", metavar="IDS", help="run only tests about these rows of docs/conformance, e.g. "
                     "VQ-PACKED-D-07,R0?")
    parser.addoption("--results", metavar="FILE", help="write what became of each test to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test an extension that is missing or stale, and start the record. Hypothesis takes the same examples
    each time, with --long others, and does not ask how busy the machine is."""
    hypothesis.settings.register_profile("vdev", deadline=None, derandomize=not config.getoption("--long"),
                                         suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("vdev")
    try:
        import ring.build  # noqa: F401
    except ImportError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    # With pytest-xdist all reports come to the first process, which is no worker.
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(config.getoption("--results"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note which rows each test is about. Leave long tests out (not: skip them) unless asked for, and with
    --rows those about other rows. Early ones come first."""
    patterns = (config.getoption("--rows") or "").split(",")
    chosen, left_out = [], []
    for item in items:
        rows = about(item)
        item.user_properties.append(("rows", rows))
        wanted = patterns == [""] or any(fnmatchcase(row, pattern) for row in rows for pattern in patterns)
        late = item.get_closest_marker("long") and not config.getoption("--long")
        (chosen if wanted and not late else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(chosen, key=lambda item: item.get_closest_marker("early") is None)


def about(item: pytest.Item) -> list[str]:
    """The ids of the rows that a test is about, by its marks and its name."""
    from vdev.testing.rows import named

    marked = [row for mark in item.iter_markers("row") for row in mark.args]
    return list(dict.fromkeys([*marked, *named(item.name)]))


@pytest.fixture(params=["pump", "step"])
def engine(request: pytest.FixtureRequest) -> Callable:
    """Each engine in turn: called as rig.pumped is, it opens a driver and its device."""
    from vdev.testing.rig import ENGINES

    return ENGINES[request.param]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lasts as long as this run, the same for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """One daemon for all tests of a module that are about a back-end behind its socket."""
    from vdev.testing.kept import KeptDaemon

    with KeptDaemon(tmp_path_factory.mktemp("kept")) as daemon:
        yield daemon


@pytest.fixture
def daemon(kept) -> Iterator:
    """That daemon; after the test it serves, and holds no more than before."""
    yield kept
    kept.check()


class Record:
    """Collects what became of each test, as pytest itself counts, and writes it at the end.

    The file: ``{"passed": n, "failed": [node id, ...], "skipped": [[node id, reason], ...], "about": {node id:
    {"rows": [row, ...], "outcome": passed, failed, skipped or not run, "why": message}}}``, the last for tests
    that are about rows. An error in collection, setup or teardown is a failure. A test that fails as expected is
    a skip with its reason.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed: set[str] = set()
        self._failed: dict[str, None] = {}
        self._skipped: dict[str, str] = {}
        self._rows: dict[str, list[str]] = {}
        self._why: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """With --collect-only the rows are all there is to tell."""
        for item in session.items:
            self._note_rows(item.nodeid, item.user_properties)

    def _note_rows(self, node: str, properties: list[tuple[str, object]]) -> None:
        if rows := dict(properties).get("rows"):
            self._rows[node] = rows

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A whole module may fail or be skipped before it has tests."""
        if report.failed:
            self._failed[report.nodeid] = None
        elif report.skipped:
            self._skipped[report.nodeid] = _reason(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Three reports come for each test: setup, call, teardown."""
        self._note_rows(report.nodeid, report.user_properties)
        if report.failed:
            self._failed[report.nodeid] = None
            crash = getattr(report.longrepr, "reprcrash", None)
            # The first: what fails after it, in the teardown, is often its consequence.
            self._why.setdefault(report.nodeid, crash.message if crash else str(report.longrepr))
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
            "about": {node: {"rows": rows, "outcome": self._outcome(node), "why": self._why.get(node, "")}
                      for node, rows in self._rows.items()},
        }))

    def _outcome(self, node: str) -> str:
        sets = {"failed": self._failed, "skipped": self._skipped, "passed": self._passed}
        return next((outcome for outcome, nodes in sets.items() if node in nodes), "not run")


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"fails as expected: {report.wasxfail}"
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)
