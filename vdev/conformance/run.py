"""Rows in, results out: each check is run, what it raises becomes a verdict, and the back-end is looked after."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ring.driver import DeviceError, OutOfGuestMemory, RingFull
from vdev.conformance import checks
from vdev.conformance.bench import Bench
from vdev.conformance.verdict import Broken, Check, NotOffered, NotReachable, Result, Verdict
from vdev.testing.rows import Row
from vhost_user.errors import Close, Disconnected, Refused
from vhost_user.frontend import NoAnswer, RequestRefused

COMES_BACK = 5.0  # seconds that a back-end which died has to come back
TRACE_LINES = 16  # of the trace, in a result


def run(bench: Bench, rows: Iterable[Row]) -> Iterator[Result]:
    """The results of ``rows``, in their order."""
    known = checks.by_row()
    gone = ""
    for row in rows:
        if row.id not in known:
            yield Result(row.id, Verdict.NO_CHECK, came=row.left_out or "no check has been written")
        elif gone:
            yield Result(row.id, Verdict.NOT_REACHABLE, known[row.id].did, gone)
        else:
            result = judge(bench, known[row.id])
            if result.verdict is Verdict.FAIL and not served(bench):
                gone = f"the back-end serves nobody since the check of {row.id}"
                result = replace(result, came=f"{result.came}; after that it serves nobody any more")
            yield result


def judge(bench: Bench, check: Check) -> Result:
    """Run ``check``: on split rings and, if it is about both and they are offered, on packed ones."""
    began = time.monotonic()
    result = _once(bench, check, packed=False)
    if check.both and result.verdict is Verdict.PASS:
        result = _once(bench, check, packed=True)
        if result.verdict in (Verdict.NOT_OFFERED, Verdict.NOT_REACHABLE):
            result = Result(check.row, Verdict.PASS, check.did)
        elif result.verdict is Verdict.FAIL:
            result = replace(result, came=f"on packed rings: {result.came}")
    return replace(result, seconds=time.monotonic() - began)


def _once(bench: Bench, check: Check, packed: bool) -> Result:
    bench.begin(packed)
    verdict, came = _verdict(lambda: check.run(bench))
    trace = bench.end()
    return Result(check.row, verdict, check.did, came, tuple(trace[-TRACE_LINES:]) if verdict is Verdict.FAIL else ())


def _verdict(run: Callable[[], None]) -> tuple[Verdict, str]:
    """How ``run`` ends. What goes wrong with a front-end that behaves is the back-end's fault."""
    try:
        run()
    except NotOffered as what:
        return Verdict.NOT_OFFERED, f"{what} is not offered"
    except NotReachable as why:
        return Verdict.NOT_REACHABLE, str(why)
    except (Broken, NoAnswer) as why:
        return Verdict.FAIL, str(why)
    except RequestRefused as why:
        return Verdict.FAIL, str(why).partition(";")[0]
    except Disconnected:
        return Verdict.FAIL, "the back-end closed the connection"
    except (Close, Refused) as why:
        return Verdict.FAIL, f"what the back-end sent makes no sense: {why}"
    except (DeviceError, RingFull, OutOfGuestMemory) as why:
        return Verdict.FAIL, f"the driver could not go on: {why}"
    except OSError as why:
        return Verdict.FAIL, f"the connection broke: {why.strerror or why}"
    except Exception as why:  # no accusation may come of a mistake of ours, and the other rows go on
        return Verdict.NOT_REACHABLE, f"the check itself broke, which should not be: {type(why).__name__}: {why}"
    return Verdict.PASS, ""


def served(bench: Bench) -> bool:
    """Is a front-end that behaves served, now or after the back-end came back?"""
    deadline = time.monotonic() + COMES_BACK
    while True:
        bench.begin(False)
        verdict, _ = _verdict(bench.look)
        bench.end()
        if verdict is Verdict.PASS:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
