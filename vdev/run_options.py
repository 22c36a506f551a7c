"""The options of ``vdev run``. Texts only: vdev/config.py turns them into a configuration and judges them."""

import argparse
from collections.abc import Iterable
from typing import NoReturn

from vdev.config import DEVICE_KEYS, PROCESS_KEYS, SHARED_KEYS, SPREADS, DaemonConfig, build
from vdev.errors import Misuse
from vdev.logs import FORMATS, LEVELS
from vdev.net.offer import PERSONALITIES
from vdev.ports.spec import KINDS


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like all others, and that takes no abbreviations: an option that
    is added later must not change what a script says."""

    def __init__(self, prog: str, description: str, epilog: str):
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise Misuse(f"{message}; `{self.prog} --help` lists what there is")


EPILOG = f"""\
ports (SPEC):
{chr(10).join(f"  {kind.USAGE}" for kind in KINDS.values())}

examples:
  vdev --socket-path /tmp/vm.sock --port tap:vm0,ip=10.0.0.1/24
  vdev --device socket=/tmp/a.sock,port=tap:a,bridge=br0 --device socket=/tmp/b.sock,port=tap:b,bridge=br0
  vdev --device socket=/tmp/a.sock,port=switch:lan --device socket=/tmp/b.sock,port=switch:lan --uplink lan=tap:lan0
  vdev qemu-args /tmp/vm.sock        what to start QEMU with
  vdev --socket-path /tmp/vm.sock --upgrade-path /tmp/vdev.upgrade
  vdev --upgrade-from /tmp/vdev.upgrade        the next version takes over from it

SIGTERM and SIGINT end vdev; SIGHUP, SIGUSR1 and SIGUSR2 are ignored. With --personality full SIGUSR1 takes the guest's
link down, and SIGUSR2 up again.
Exit status: 0 fine, 1 failed, 2 misused.
"""


def parser(prog: str, verbs: str = "") -> Parser:
    """The parser of ``vdev run``, and with ``verbs``, a text for its help, of ``vdev`` without a verb."""
    run = Parser(prog, "Serve a virtio-net device to a VMM over vhost-user.", verbs + EPILOG)

    device = run.add_argument_group("the device").add_argument
    device("--socket-path", dest="socket", metavar="PATH", help="listen on the Unix socket PATH")
    device("--fd", metavar="N",
           help="use the inherited socket N, connected or listening (default: the one in LISTEN_FDS)")
    device("--port", metavar="SPEC",
           help="where frames go (default: a new TAP where one may be made, else responder)")
    device("--queue-pairs", metavar="N",
           help="offer N queue pairs (default: 8 on a TAP that has several queues, else 1)")
    device("--features", metavar="LIST",
           help="do not offer some features, or insist on some: -mrg_rxbuf,+guest_tso4")
    device("--personality", metavar="|".join(PERSONALITIES),
           help=f"what the front-end is: QEMU's net device, or one that leaves the whole device to vdev "
                f"(default: {PERSONALITIES[0]})")
    device("--mac", metavar="MAC", help="with --personality full: the guest's address (default: one made from PATH)")
    device("--speed", metavar="N",
           help="with --personality full: what the guest takes for the link's speed, in Mbit/s (default: 10000)")
    device("--postcopy", action="store_const", const=True,
           help="let guests arrive by postcopy migration; the front-end must be trusted as vdev itself")
    device("--lint", nargs="?", const="on", metavar="strict",
           help="name each rule of the specification that the guest's driver breaks; strict: end the session at the "
                "first MUST. Slow")
    device("--client", action="store_const", const=True,
           help="connect to PATH, where the front-end listens, and try again for ever")
    device("--socket-group", metavar="GROUP",
           help="group of the socket; auto: the first of libvirt-qemu, qemu, kvm that exists")
    device("--socket-mode", metavar="MODE", help="permissions of the socket in octal (default 0660)")
    device("--uplink", action="append", metavar="NAME=SPEC",
           help="join the switch NAME to the host's network by the TAP that SPEC describes; repeatable")
    device("--device", action="append", default=[], metavar="socket=PATH,port=SPEC,...",
           help=f"one device of several; repeatable. Keys: {', '.join(DEVICE_KEYS)}, and those of its port")

    process = run.add_argument_group("the process").add_argument
    process("--one-off", action="store_const", const=True, help="end after the first session of each device")
    process("--ready-fd", metavar="N", help="write READY to descriptor N and close it when ready")
    process("--upgrade-path", metavar="PATH",
            help="let another vdev of this user take over, without the guests noticing, at the Unix socket PATH")
    process("--upgrade-from", metavar="PATH",
            help="take over from the vdev that was given --upgrade-path PATH: devices, front-ends, traffic")
    process("--workers", metavar="|".join([*SPREADS, "N"]),
            help="a worker thread for each device, queue pair or direction of one, or N for all (default: device)")
    process("--cpus", metavar="LIST", help="processors on which workers run, one after the other: 2,3")
    process("--poll-us", metavar="N|always",
            help="look for more up to N microseconds before sleeping: faster, for processor time (default: 0)")
    process("--sandbox", metavar="on|off", help="off: keep all rights, to look at vdev with a debugger (default on)")
    process("--config", metavar="FILE.toml", help="read options from a file; the command line wins")
    process("--check-config", action="store_true", help="list all mistakes in the configuration and end")
    process("--log-format", metavar="|".join(FORMATS), help="default: text")

    logs = run.add_argument_group("how much to say").add_mutually_exclusive_group().add_argument
    logs("--log-level", metavar="|".join(LEVELS), help="default: info")
    logs("-v", "--verbose", dest="log_level", action="store_const", const="debug", help="--log-level debug")
    logs("-q", "--quiet", dest="log_level", action="store_const", const="warning", help="--log-level warning")

    about = run.add_argument_group("about").add_argument
    about("--print-capabilities", action="store_true",
          help="print what the back-end program convention asks for, and do nothing else")
    about("--version", action="store_true", help="print the version")
    return run


def join_features(arguments: Iterable[str]) -> list[str]:
    """``--features -mrg_rxbuf`` as one word: argparse would take the value for an option."""
    joined = []
    rest = iter(arguments)
    for argument in rest:
        value = next(rest, None) if argument == "--features" else None
        joined.append(argument if value is None else f"{argument}={value}")
    return joined


def configure(options: argparse.Namespace, passed: list[int]) -> DaemonConfig:
    """The configuration that parsed ``options`` ask for; ``passed``: see :func:`vdev.config.build`.

    Raises Misuse with every mistake.
    """
    def given(keys: Iterable[str]) -> dict[str, object]:
        values = {key: getattr(options, key.replace("-", "_")) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    return build(given(PROCESS_KEYS), given(SHARED_KEYS), given(("socket", "fd", "port", "mac")),
                 devices=options.device, file=options.config, passed=passed)
