"""What the daemon is to do, from the command line and from a TOML file; checked as a whole.

Both sources are first brought into one shape, a table of keys for each device, and then read by the same
converters. Every mistake is collected: whoever asks with ``--check-config`` gets the complete list.

The file has the keys of the command line without their dashes, and a ``[[device]]`` table with the keys of
``--device`` for each device::

    log-format = "json"
    queue-pairs = 2                     # for each device that does not say otherwise

    [[device]]
    socket = "/run/vdev/vm1.sock"
    port = "tap:vm1,ip=10.0.0.1/24"
    features = ["-mrg_rxbuf"]
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vdev.errors import Misuse
from vdev.features_option import FeatureEdit, parse_features
from vdev.listen import PATH_MAX
from vdev.logs import FORMATS, LEVELS
from vdev.net.config_space import SPEED_MAX
from vdev.net.mac import parse_mac
from vdev.net.offer import PERSONALITIES
from vdev.options import OptionError, pairs, split
from vdev.ports.spec import PortSpec, SwitchSpec, TapSpec, parse_port, switch_name, take_port

# SET_VRING_KICK and its kin carry the ring's index in 8 bits (vhost-user, "VHOST_USER_SET_VRING_KICK")
QUEUE_PAIRS_MAX = 128

LINTS = ("off", "on", "strict")
SPREADS = ("device", "pair", "direction")  # one worker each
WORKERS_MAX = 64
CPU_MAX = 8191  # Linux has no more
POLL_US_MAX = 1_000_000


@dataclass(frozen=True)
class DeviceConfig:
    """One device. Exactly one of ``socket_path`` and ``fd`` is set.

    socket_path: where to listen, or (``client``) where to connect to.
    fd: an inherited socket, connected or listening.
    socket_group: name, number or ``auto``; None leaves the group alone.
    port: None for the default one.
    queue_pairs: 1 to QUEUE_PAIRS_MAX; None for what suits the port.
    personality: what kind of front-end to expect, of vdev.net.offer.PERSONALITIES.
    mac, speed: what the configuration space says, where it is ours: 6 bytes, None for one made from the socket's path;
    Mbit/s.
    postcopy: guests may arrive by postcopy; see vdev/postcopy.py for what that gives the front-end.
    lint: one of LINTS; strict ends a session whose driver breaks a MUST.
    """

    name: str
    socket_path: str | None = None
    fd: int | None = None
    client: bool = False
    socket_group: str | None = None
    socket_mode: int = 0o660
    port: PortSpec | None = None
    queue_pairs: int | None = None
    features: FeatureEdit = FeatureEdit()
    personality: str = PERSONALITIES[0]
    mac: bytes | None = None
    speed: int = 10_000
    postcopy: bool = False
    lint: str = "off"

    def __str__(self) -> str:
        """The socket as the ``ready`` line gives it."""
        return f"socket={self.socket_path}" if self.socket_path is not None else f"fd={self.fd}"


@dataclass(frozen=True)
class UplinkConfig:
    """A port that is a member of the switch ``switch``."""

    switch: str
    port: PortSpec


@dataclass(frozen=True)
class DaemonConfig:
    """The process. one_off: end after one session of each device. sandbox: see vdev/sandbox.py. upgrade_path: where a
    successor may ask for everything; upgrade_from: where this one asks. Only then there may be no devices: they are
    the other's. workers, cpus, poll_us: see vdev/workers.py; poll_us None for always."""

    devices: tuple[DeviceConfig, ...]
    one_off: bool = False
    ready_fd: int | None = None
    sandbox: bool = True
    log_format: str = "text"
    log_level: str = "info"
    upgrade_path: str | None = None
    upgrade_from: str | None = None
    workers: str | int = SPREADS[0]
    cpus: tuple[int, ...] = ()
    poll_us: int | None = 0
    uplinks: tuple[UplinkConfig, ...] = ()


# --------------------------------------------------------------------------------------- converters
# Each takes what a source has (text, or a TOML value) and gives what the configuration has, or raises
# ValueError with the rule that was broken. OptionError, a ValueError too, names its option itself.


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            value = int(value) if len(value) < 10 else high + 1
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a number from {low} to {high}")
        return value
    return convert


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a text that is not empty")
    return value


def _path(value: Any) -> str:
    if len(os.fsencode(_text(value))) > PATH_MAX:
        raise ValueError(f"is longer than {PATH_MAX} bytes, the most a Unix socket's path may have")
    return value


def _group(value: Any) -> str:
    return str(value) if type(value) is int and value >= 0 else _text(value)


def _mode(value: Any) -> int:
    # TOML writes 0o660; the command line, like chmod, 660 or 0660
    if isinstance(value, str) and len(value) <= 5 and value and not set(value) - set("01234567"):
        value = int(value, 8)
    if type(value) is not int or not 0 <= value <= 0o777:
        raise ValueError("must be permissions in octal, e.g. 0660 (0o660 in a file)")
    return value


def _flag(value: Any) -> bool:
    if value in ("on", "off"):
        return value == "on"
    if not isinstance(value, bool):
        raise ValueError("must be on or off (true or false in a file)")
    return value


def _lint(value: Any) -> str:
    if isinstance(value, bool):
        return LINTS[value]
    return _choice(*LINTS)(value)


def _choice(*known: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return value
    return convert


def _features(value: Any) -> FeatureEdit:
    items = value if isinstance(value, list) else split(_text(value))
    if not all(isinstance(item, str) for item in items):
        raise ValueError('must be a list of texts, e.g. ["-mrg_rxbuf"]')
    return parse_features(items)


def _port(value: Any) -> PortSpec:
    # in a --device the options of a port are read together with those of the device, hence the port is ready
    return parse_port(_text(value)) if isinstance(value, str) else value


def _workers(value: Any) -> str | int:
    try:
        return value if value in SPREADS else _integer(1, WORKERS_MAX)(value)
    except ValueError:
        raise ValueError(f"must be {', '.join(SPREADS)} or a number from 1 to {WORKERS_MAX}") from None


def _cpus(value: Any) -> tuple[int, ...]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        found = tuple(map(_integer(0, CPU_MAX), items))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise ValueError("must be numbers of processors, each once: 2,3 ([2, 3] in a file)")
    return found


def _poll_us(value: Any) -> int | None:
    try:
        return None if value == "always" else _integer(0, POLL_US_MAX)(value)
    except ValueError:
        raise ValueError(f"must be microseconds from 0 (off) to {POLL_US_MAX}, or always") from None


def _uplinks(value: Any) -> tuple[UplinkConfig, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError('must be a list of texts, e.g. ["lan=tap:vdev0"]')
    return tuple(map(_uplink, value))


def _uplink(text: str) -> UplinkConfig:
    where = f"--uplink {text}"
    name, equals, port = text.partition("=")
    if not equals:
        raise OptionError(f"{where}: must be NAME=PORT, the name of a switch and a TAP, e.g. lan=tap:vdev0")
    spec = parse_port(port, where)
    if not isinstance(spec, TapSpec):
        raise OptionError(f"{where}: an uplink is a TAP, {TapSpec.USAGE}")
    return UplinkConfig(switch_name(name, where), spec)


_descriptor = _integer(0, (1 << 20) - 1)  # the kernel's own limit for one process, fs.nr_open
queue_pairs = _integer(1, QUEUE_PAIRS_MAX)

# key: (attribute of DeviceConfig, converter)
DEVICE_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("name", _text),
    "socket": ("socket_path", _path),
    "fd": ("fd", _descriptor),
    "client": ("client", _flag),
    "socket-group": ("socket_group", _group),
    "socket-mode": ("socket_mode", _mode),
    "port": ("port", _port),
    "queue-pairs": ("queue_pairs", queue_pairs),
    "features": ("features", _features),
    "personality": ("personality", _choice(*PERSONALITIES)),
    "mac": ("mac", lambda value: parse_mac(_text(value))),
    "speed": ("speed", _integer(0, SPEED_MAX)),
    "postcopy": ("postcopy", _flag),
    "lint": ("lint", _lint),
}
# those that may also be given once for all devices
SHARED_KEYS = ("client", "socket-group", "socket-mode", "queue-pairs", "features", "personality", "speed",
               "postcopy", "lint")

PROCESS_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "one-off": ("one_off", _flag),
    "ready-fd": ("ready_fd", _descriptor),
    "sandbox": ("sandbox", _flag),
    "log-format": ("log_format", _choice(*FORMATS)),
    "log-level": ("log_level", _choice(*LEVELS)),
    "upgrade-path": ("upgrade_path", _path),
    "upgrade-from": ("upgrade_from", _path),
    "workers": ("workers", _workers),
    "cpus": ("cpus", _cpus),
    "poll-us": ("poll_us", _poll_us),
    "uplink": ("uplinks", _uplinks),
}

# of those, what makes sense for one start only
_NOT_IN_A_FILE = ("ready-fd", "upgrade-from")


def _option(key: str) -> str:
    """The long option that gives ``key`` of a device."""
    return "--socket-path" if key == "socket" else f"--{key}"


@dataclass
class _Table:
    """Keys and values from one place, not yet converted. ``where`` precedes a key in error lines: ``--`` for
    options of the command line, else a place that ends in a colon and a blank."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Collects errors while it converts."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def convert(self, table: _Table, keys: dict[str, tuple[str, Callable[[Any], Any]]]) -> dict[str, Any]:
        """The attributes that ``table`` gives; what is wrong is left out and noted."""
        found = {}
        for key, value in table.values.items():
            if key not in keys:
                self.errors.append(f"{table.where}{key}: unknown key; known: {', '.join(keys)}")
                continue
            attribute, converter = keys[key]
            try:
                found[attribute] = converter(value)
            except OptionError as error:
                self.errors.append(f"{table.where.removesuffix('--')}{error}")
            except ValueError as error:
                name = _option(key) if table.where == "--" else table.where + key
                self.errors.append(f"{name} {value}: {error}")
        return found

    def device_option(self, text: str) -> _Table:
        """The table that ``--device TEXT`` describes."""
        where = f"--device {text}"
        table = _Table(f"{where}: ")
        try:
            port, rest = take_port(pairs(split(text), where), where)
        except OptionError as error:
            self.errors.append(str(error))
            return table
        for key, value in rest:
            if key in table.values:
                self.errors.append(f"{where}: {key}= is given twice; give it once")
            table.values[key] = value
        if port is not None:
            table.values["port"] = port
        return table


def read_file(path: str) -> dict[str, Any]:
    """The contents of TOML file ``path``. Raises Misuse."""
    import tomllib  # here, because most daemons have no file

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise Misuse(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"--config {path}: not valid TOML: {error}") from None


def build(process: dict[str, Any], shared: dict[str, Any], single: dict[str, Any],
          devices: Iterable[str] = (), file: str | None = None, passed: Iterable[int] = ()) -> DaemonConfig:
    """The configuration that all sources together ask for.

    process, shared: values of PROCESS_KEYS and SHARED_KEYS given on the command line; they win over the file.
    single: ``socket``, ``fd`` and ``port`` given on the command line, outside a ``--device``.
    devices: the text of each ``--device``; file: the path given to ``--config``.
    passed: descriptors from the service manager, taken in order by devices that name no socket.
    Raises Misuse with every mistake found.
    """
    reader = _Reader()
    contents = read_file(file) if file is not None else {}
    tables = _file_devices(reader, contents.pop("device", []), file)
    top = _Table(f"{file}: ", contents)
    outer = {**{key: PROCESS_KEYS[key] for key in PROCESS_KEYS if key not in _NOT_IN_A_FILE},
             **{key: DEVICE_KEYS[key] for key in SHARED_KEYS}}
    settings = reader.convert(top, outer)
    settings |= reader.convert(_Table("--", process), PROCESS_KEYS)
    tables += [reader.device_option(text) for text in devices]
    if single and tables:
        reader.errors.append(f"{_option(next(iter(single)))} describes a device of its own and does not go "
                             "with --device or [[device]]; write it inside one")
    elif not tables and (single or shared or "upgrade-from" not in process):
        tables, shared = [_Table("--", single | shared)], {}
    settings |= reader.convert(_Table("--", shared), DEVICE_KEYS)
    defaults = {DEVICE_KEYS[key][0]: settings.pop(DEVICE_KEYS[key][0])
                for key in SHARED_KEYS if DEVICE_KEYS[key][0] in settings}
    found = _devices(reader, tables, defaults, list(passed))
    _check_together(reader, found, settings)
    _check_switches(reader, found, settings)
    _check_personality(reader, found, settings)
    _check_lint(reader, found, settings)
    if reader.errors:
        raise Misuse(*reader.errors)
    return DaemonConfig(devices=tuple(found), **settings)


def _file_devices(reader: _Reader, tables: Any, file: str | None) -> list[_Table]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reader.errors.append(f"{file}: device: write [[device]], with two brackets, above each device's keys")
        return []
    return [_Table(f"{file}: device {number}: ", table) for number, table in enumerate(tables, 1)]


def _devices(reader: _Reader, tables: list[_Table], defaults: dict[str, Any],
             passed: list[int]) -> list[DeviceConfig]:
    found = []
    for number, table in enumerate(tables):
        named = [key for key in ("socket", "fd") if key in table.values]
        if not named and passed:
            table.values["fd"] = passed.pop(0)
        elif len(named) != 1:
            ways = "--socket-path PATH or --fd N" if table.where == "--" else "socket=PATH or fd=N"
            problem = "two sockets, of which only one can be" if named else "no socket"
            reader.errors.append(f"{table.where.removesuffix('--')}{problem}: give {ways}")
        own = reader.convert(table, DEVICE_KEYS)
        chosen = {"name": f"net{number}", **defaults, **own}
        if "fd" in table.values:
            chosen["client"] = False
            _refuse(reader, table, ("client", "socket-group", "socket-mode"), "with an inherited socket")
        elif chosen.get("client"):
            _refuse(reader, table, ("socket-group", "socket-mode"), "for a client, which makes no socket")
        found.append(DeviceConfig(**chosen))
    if passed:
        reader.errors.append(f"the service manager passed {len(passed)} sockets more than there are devices "
                             "without one; add a --device port=... for each")
    return found


def _refuse(reader: _Reader, table: _Table, keys: Iterable[str], reason: str) -> None:
    reader.errors += [f"{table.where}{key} means nothing {reason}; leave it out"
                      for key in keys if key in table.values]


def _check_together(reader: _Reader, devices: list[DeviceConfig], settings: dict[str, Any]) -> None:
    """What is fine for each device and wrong for all of them: two claim the same thing."""
    upgrade_path, ready_fd = settings.get("upgrade_path"), settings.get("ready_fd")
    ports = [device.port for device in devices] + [uplink.port for uplink in settings.get("uplinks", ())]
    claims = [("name", device.name) for device in devices]
    sockets = [device.socket_path for device in devices] + [upgrade_path]
    claims += [("socket", path) for path in sockets if path is not None]
    fds = [device.fd for device in devices] + [ready_fd]
    fds += [port.fd for port in ports if isinstance(port, TapSpec)]
    claims += [("descriptor", fd) for fd in fds if fd is not None]
    for what, value in dict.fromkeys(claim for claim in claims if claims.count(claim) > 1):
        reader.errors.append(f"{what} {value} is given twice; each use needs one of its own")


def _check_personality(reader: _Reader, devices: list[DeviceConfig], settings: dict[str, Any]) -> None:
    """What goes with a configuration space of ours only, and what does not go with one."""
    for device in devices:
        if device.personality != "full" and device.mac is not None:
            reader.errors.append(f"{device.name}: the MAC address is QEMU's to give; leave mac out, or give "
                                 "personality full for another front-end")
        elif device.personality == "full" and "upgrade_path" in settings:
            reader.errors.append(f"{device.name}: --upgrade-path does not go with personality full: what the guest's "
                                 "driver has set is not handed over; leave one of the two out")


def _check_switches(reader: _Reader, devices: list[DeviceConfig], settings: dict[str, Any]) -> None:
    """What does not go with a switch."""
    at_switches = [device for device in devices if isinstance(device.port, SwitchSpec)]
    reader.errors += [f"{device.name}: postcopy does not go with {device.port}: others would wait for pages that this "
                      "guest still lacks; leave one of the two out" for device in at_switches if device.postcopy]
    if at_switches and "upgrade_path" in settings:
        reader.errors.append(f"--upgrade-path does not go with {at_switches[0].port}: a switch cannot be handed over; "
                             "leave it out, or join the guests by a bridge of the host")
    uplinks = settings.get("uplinks", ())
    if uplinks and "upgrade_from" in settings:
        reader.errors.append("--uplink does not go with --upgrade-from: a switch cannot be taken over; leave it out")
    elif not {uplink.switch for uplink in uplinks} <= (names := {device.port.name for device in at_switches}):
        reader.errors += [f"--uplink {uplink.switch}={uplink.port}: no device is at that switch; give one --port "
                          f"switch:{uplink.switch}" for uplink in uplinks if uplink.switch not in names]


def _check_lint(reader: _Reader, devices: list[DeviceConfig], settings: dict[str, Any]) -> None:
    """What does not go with a linter, which serves its device in the control thread."""
    linted = [device for device in devices if device.lint != "off"]
    reader.errors += [f"{device.name}: lint does not go with {device.port}: a linted device is served by itself; give "
                      "it another port" for device in linted if isinstance(device.port, SwitchSpec)]
    reader.errors += [f"{device.name}: lint does not go with postcopy: who looks at the rings would wait for pages "
                      "that only it can ask for; leave one of the two out" for device in linted if device.postcopy]
    if linted and {"upgrade_path", "upgrade_from"} & settings.keys():
        reader.errors.append("--lint does not go with --upgrade-path and --upgrade-from: what was found so far cannot "
                             "be handed over; leave one of the two out")
