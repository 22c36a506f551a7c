"""The table of commands, and how one is executed (virtio 1.2, 5.1.6.5 "Control Virtqueue")."""

from dataclasses import dataclass

from vdev.net.control import coalescing, filters, offloads, statistics, steering
from vdev.net.control.command import Command, Context, Outcome, Rejected, unpack
from vdev.net.features import Feature


@dataclass(frozen=True)
class Row:
    """One command: what it is called, the feature it needs, what it does."""

    name: str
    needs: Feature
    execute: Command


def _announced(data: bytes, context: Context) -> Outcome:
    """The driver has announced its guest (5.1.6.5.4)."""
    unpack("", data)
    return Outcome(context.settings, announced=True)


def _rows(number: int, name: str, *commands: tuple[str, Feature, Command]) -> dict[tuple[int, int], Row]:
    return {(number, command): Row(f"{name}_{what}", needs, execute)
            for command, (what, needs, execute) in enumerate(commands)}


_F = Feature

# (class, command) -> row
COMMANDS: dict[tuple[int, int], Row] = {
    **_rows(0, "RX",
            ("PROMISC", _F.CTRL_RX, filters.mode("promiscuous")),
            ("ALLMULTI", _F.CTRL_RX, filters.mode("all_multicast")),
            ("ALLUNI", _F.CTRL_RX_EXTRA, filters.mode("all_unicast")),
            ("NOMULTI", _F.CTRL_RX_EXTRA, filters.mode("no_multicast")),
            ("NOUNI", _F.CTRL_RX_EXTRA, filters.mode("no_unicast")),
            ("NOBCAST", _F.CTRL_RX_EXTRA, filters.mode("no_broadcast"))),
    **_rows(1, "MAC",
            ("TABLE_SET", _F.CTRL_RX, filters.mac_table_set),
            ("ADDR_SET", _F.CTRL_MAC_ADDR, filters.mac_addr_set)),
    **_rows(2, "VLAN",
            ("ADD", _F.CTRL_VLAN, filters.vlan_add),
            ("DEL", _F.CTRL_VLAN, filters.vlan_del)),
    **_rows(3, "ANNOUNCE",
            ("ACK", _F.GUEST_ANNOUNCE, _announced)),
    **_rows(4, "MQ",
            ("VQ_PAIRS_SET", _F.MQ, steering.vq_pairs_set),
            ("RSS_CONFIG", _F.RSS, steering.rss_config),
            ("HASH_CONFIG", _F.HASH_REPORT, steering.hash_config)),
    **_rows(5, "GUEST_OFFLOADS",
            ("SET", _F.CTRL_GUEST_OFFLOADS, offloads.guest_offloads_set)),
    **_rows(6, "NOTF_COAL",
            ("TX_SET", _F.NOTF_COAL, coalescing.transmitqs_set),
            ("RX_SET", _F.NOTF_COAL, coalescing.receiveqs_set),
            ("VQ_SET", _F.VQ_NOTF_COAL, coalescing.vq_set),
            ("VQ_GET", _F.VQ_NOTF_COAL, coalescing.vq_get)),
    **_rows(7, "HASH_TUNNEL",
            ("SET", _F.HASH_TUNNEL, steering.hash_tunnel_set)),
    **_rows(8, "STATS",
            ("QUERY", _F.DEVICE_STATS, statistics.query),
            ("GET", _F.DEVICE_STATS, statistics.get)),
}


def execute(command: bytes, context: Context) -> Outcome:
    """Execute a command, all that a driver has written of it: class, number, data. Raises Rejected."""
    if len(command) < 2:
        raise Rejected(f"a command of {len(command)} bytes has no class and number")
    row = COMMANDS.get((command[0], command[1]))
    if row is None:
        raise Rejected(f"class {command[0]} has no command {command[1]}")
    if not context.has(row.needs):
        raise Rejected(f"{row.name}: {row.needs.name} was not negotiated")
    try:
        return row.execute(command[2:], context)
    except Rejected as why:
        raise Rejected(f"{row.name}: {why}") from None
