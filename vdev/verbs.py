"""What ``vdev`` can be asked to do: one function a verb, given the arguments after it and its full name.

A verb brings in what is heavy only when it runs, so that a mistake is answered at once. All of them may
raise Misuse and Failure.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from vdev import run_options
from vdev.config import queue_pairs
from vdev.errors import Failure, Misuse
from vdev.run_options import Parser


@dataclass(frozen=True)
class Verb:
    """``about`` is its line in the help."""

    about: str
    run: Callable[[list[str], str], None]


def dispatch(arguments: list[str]) -> None:
    """Run the verb that ``arguments`` begin with, or ``run`` when they begin with an option."""
    verb = arguments[0] if arguments else ""
    if not verb or verb.startswith("-"):
        listed = "".join(f"  vdev {name:19} {verb.about}\n" for name, verb in VERBS.items())
        _run(arguments, "vdev", f"verbs:\n{listed}\n")
    elif verb not in VERBS:
        raise Misuse(f"unknown verb {verb!r}; known: {', '.join(VERBS)}; `vdev --help` tells more")
    else:
        VERBS[verb].run(arguments[1:], f"vdev {verb}")


def _run(arguments: list[str], prog: str, verbs: str = "") -> None:
    from vdev.notify import passed_fds

    options = run_options.parser(prog, verbs).parse_args(run_options.join_features(arguments))
    if options.version:
        from vdev import __version__

        print(f"vdev {__version__}")
        return
    config = run_options.configure(options, passed_fds())
    if options.check_config:
        print(f"no mistakes found; {len(config.devices)} device{'s' * (len(config.devices) != 1)}")
        return
    from vdev import logs
    from vdev.daemon import Daemon

    logs.setup(config.log_level, config.log_format)
    Daemon(config).run()


def _qemu_args(arguments: list[str], prog: str) -> None:
    from vdev.qemu import QemuError, format_shell, qemu_args

    parser = Parser(prog, "Print the QEMU options that give a guest the device behind SOCKET: shared memory, "
                    "the socket, the network device.",
                    epilog='example:\n  eval "qemu-system-x86_64 disk.img $(vdev qemu-args /tmp/vm.sock)"')
    parser.add_argument("socket", metavar="SOCKET", help="what vdev was given as --socket-path")
    parser.add_argument("--memory", default="512M", metavar="SIZE",
                        help="of the guest, as for -m (default 512M)")
    parser.add_argument("--queue-pairs", default="1", metavar="N",
                        help="what vdev was given, or less (default 1)")
    parser.add_argument("--qemu", metavar="BINARY",
                        help="the QEMU to ask for its version (default: the one on PATH)")
    parser.add_argument("--mac", metavar="MAC", help="the guest's address (default: one made from SOCKET)")
    parser.add_argument("--server", action="store_true", help="QEMU listens: for vdev --client")
    parser.add_argument("--kvm", action="store_true",
                        help="the guest runs under KVM: leave out what only TCG needs")
    parser.add_argument("--iommu", action="store_true",
                        help="give the guest an IOMMU (x86), with the device behind it")
    parser.add_argument("--packed", action="store_true",
                        help="offer the guest packed rings; QEMU does not by itself")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of shell words")
    options = parser.parse_args(arguments)
    try:
        pairs = queue_pairs(options.queue_pairs)
    except ValueError as error:
        raise Misuse(f"--queue-pairs {options.queue_pairs}: {error}") from None
    try:
        args = qemu_args(options.socket, memory=options.memory, queue_pairs=pairs, qemu=options.qemu,
                         mac=options.mac, server=options.server, kvm=options.kvm, packed=options.packed,
                         iommu=options.iommu)
    except QemuError as error:
        raise Failure(str(error)) from None
    print(json.dumps(args) if options.json else format_shell(args))


def _demo(arguments: list[str], prog: str) -> None:
    from vdev.demo import run_demo

    run_demo(arguments, prog)


def _check(arguments: list[str], prog: str) -> None:
    from vdev.conformance.command import check

    check(arguments, prog)


def _capabilities(arguments: list[str], prog: str) -> None:
    from vdev import descriptor

    parser = Parser(prog, "Print what this build can do: features, ports, limits.",
                    epilog="example:\n  vdev capabilities --json")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_args(arguments)
    found = descriptor.capabilities()
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        listed = " ".join(value) if isinstance(value, list | dict) else value
        print(f"{name.replace('_', ' ')}: {listed}")


def _install_descriptor(arguments: list[str], prog: str) -> None:
    from vdev import descriptor

    parser = Parser(prog, "Write the JSON file by which management software finds back-end programs "
                    "(vhost-user, \"Backend program conventions\"), and print its path.",
                    epilog="example:\n  vdev install-descriptor --user")
    parser.set_defaults(directory=descriptor.user_directory())
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", dest="directory", action="store_const", const=descriptor.user_directory(),
                       help=f"for this user: {descriptor.user_directory()} (the default)")
    where.add_argument("--system", dest="directory", action="store_const", const=descriptor.SYSTEM_DIRECTORY,
                       help=f"for everybody: {descriptor.SYSTEM_DIRECTORY}")
    where.add_argument("--directory", metavar="DIRECTORY",
                       help="for packagers, e.g. a staged /usr/share/qemu/vhost-user")
    parser.add_argument("--json", action="store_true", help="print a JSON object with the path")
    options = parser.parse_args(arguments)
    path = descriptor.install(options.directory)
    print(json.dumps({"path": path}) if options.json else path)


def _install_units(arguments: list[str], prog: str) -> None:
    from vdev import systemd

    parser = Parser(prog, "Write the systemd units vdev@.service and vdev@.socket, an instance for each guest, and "
                    "print their paths.", epilog="example:\n  vdev install-units --directory ./units")
    parser.add_argument("--directory", metavar="DIRECTORY", default=systemd.SYSTEM_DIRECTORY,
                        help=f"default: {systemd.SYSTEM_DIRECTORY}; for packagers, e.g. /usr/lib/systemd/system")
    parser.add_argument("--json", action="store_true", help="print a JSON object with the paths")
    options = parser.parse_args(arguments)
    paths = systemd.install(options.directory)
    print(json.dumps({"paths": paths}) if options.json else "\n".join(paths))


VERBS = {
    "run": Verb("serve a virtio-net device; this is what `vdev` without a verb does", _run),
    "qemu-args": Verb("print the QEMU options for a socket", _qemu_args),
    "demo": Verb("watch a guest get an address and answer pings: no root, no image", _demo),
    "check": Verb("hold any vhost-user net back-end against the specifications", _check),
    "capabilities": Verb("print what this build can do", _capabilities),
    "install-descriptor": Verb("make vdev known to management software", _install_descriptor),
    "install-units": Verb("have systemd start vdev for a guest", _install_units),
}
