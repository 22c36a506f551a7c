"""Live migration of a real guest from one QEMU process to another.

Both QEMUs run here, joined by a Unix socket. A guest that migrates keeps its memory, its processors and its
addresses; its devices' back-ends it finds anew at the other end (QEMU, docs/devel/migration).
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdev.testing.guest import LinuxGuest
from vdev.testing.netns import Namespace
from vdev.testing.qemu import Qemu, QmpError

SECONDS = 240  # for a whole migration under load, on a machine that has other things to do
# As much bandwidth as there is, and time enough to stop in for a guest that writes all the while.
PARAMETERS = {"max-bandwidth": 0, "downtime-limit": 500}
# Until postcopy is asked for: slow enough for most of memory to be left behind then.
BEFORE_POSTCOPY = {"max-bandwidth": 32 << 20, "max-postcopy-bandwidth": 0}


class MigrationFailed(RuntimeError):
    """The guest did not get to the other side. The text says how far it came, in QEMU's words."""


@dataclass(frozen=True)
class Report:
    """What QEMU says of a migration that is over. downtime and total in milliseconds, transferred in bytes of guest
    memory, rounds: how often the dirty log was collected. asked: how many pages the guest's new place asked for, in
    postcopy."""

    downtime: int
    total: int
    transferred: int
    rounds: int
    asked: int = 0


def _status(qemu: Qemu) -> dict:
    return qemu.qmp.execute("query-migrate")


def _await(qemu: Qemu, wanted: Sequence[str], seconds: float = SECONDS) -> dict:
    """Wait until the migration of ``qemu`` is in one of these states. Raises MigrationFailed."""
    deadline = time.monotonic() + seconds
    while (found := _status(qemu)).get("status") not in wanted:
        if found.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
            raise MigrationFailed(f"waited for {' or '.join(wanted)}, and it is {json.dumps(found)}")
        time.sleep(0.02)
    return found


def migrate(guest: LinuxGuest, network: Sequence[str], *, namespace: Namespace | None = None, postcopy: bool = False,
            on_way: Callable[[], None] = lambda: None) -> Report:
    """Move ``guest`` to a new QEMU on ``network``, with which it obeys afterwards.

    network: QEMU options as for LinuxGuest; the MAC has to be the same. namespace: where the new QEMU runs.
    postcopy: let the guest go on at the other side while most of its memory is still here. on_way: called when the
    first round of copying is under way. Raises MigrationFailed, ProcessDied, QmpError, and the guest is where it was.
    """
    with tempfile.TemporaryDirectory(prefix="vdev-migration-") as folder:
        uri = f"unix:{folder}/socket"
        there = guest.twin(network, namespace)
        try:
            for qemu in (guest.qemu, there):
                set_up(qemu, postcopy=postcopy)
            there.qmp.execute("migrate-incoming", {"uri": uri})
            guest.qemu.qmp.execute("migrate", {"uri": uri})
            _await(guest.qemu, ["active", "completed"])
            on_way()
            if postcopy:
                guest.qemu.qmp.execute("migrate-start-postcopy")
            done = _await(guest.qemu, ["completed"])
            _await_running(there)
        except QmpError as error:
            ends = [str(qemu.child.died(side)) for side, qemu in (("source", guest.qemu), ("destination", there))]
            there.kill()
            raise MigrationFailed("\n".join([f"the guest did not arrive ({error})", *ends])) from None
        except BaseException:
            there.kill()
            raise
    guest.follow(there)
    ram = done["ram"]
    return Report(done.get("downtime", 0), done["total-time"], ram["transferred"], ram["dirty-sync-count"],
                  ram["postcopy-requests"])


def set_up(qemu: Qemu, *, postcopy: bool = False, **parameters: int) -> None:
    """Prepare either side; ``parameters`` as migrate-set-parameters has them, with _ for -."""
    if postcopy:
        qemu.qmp.execute("migrate-set-capabilities",
                         {"capabilities": [{"capability": "postcopy-ram", "state": True}]})
    named = {name.replace("_", "-"): value for name, value in parameters.items()}
    qemu.qmp.execute("migrate-set-parameters", PARAMETERS | (BEFORE_POSTCOPY if postcopy else {}) | named)


def _await_running(qemu: Qemu, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while (found := qemu.qmp.execute("query-status")["status"]) != "running":
        if time.monotonic() > deadline:
            raise MigrationFailed(f"the guest arrived and does not run: {found}")
        time.sleep(0.01)


def start_and_cancel(guest: LinuxGuest, started: Callable[[], None]) -> None:
    """Begin to migrate to nowhere, call ``started`` once memory is copied and writes are logged, and cancel."""
    set_up(guest.qemu, max_bandwidth=1 << 20)  # slow enough never to get done
    guest.qemu.qmp.execute("migrate", {"uri": "exec:cat >/dev/null"})
    _await(guest.qemu, ["active"])
    started()
    guest.qemu.qmp.execute("migrate_cancel")
    _await(guest.qemu, ["cancelled"])
