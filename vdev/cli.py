"""The ``vdev`` command: which verb was asked for, and how it ended.

Exit status: 0 fine, 1 failed, 2 misused. A user's mistake is one line on standard error that starts with
``vdev:`` (one for each mistake where several were found), never a traceback.

This module imports next to nothing, each verb what it needs: ``--print-capabilities`` is asked by management
software of every back-end it finds, and has to answer at once and under any circumstances.
"""

import os
import sys

# VHostUserBackendCapabilities of QEMU's docs/interop/vhost-user.json: its union has no branch for a net
# device, so that there is nothing to add.
CAPABILITIES = '{"type": "net"}'

VERBS = {
    "run": "serve a virtio-net device; this is what `vdev` without a verb does",
    "qemu-args": "print the QEMU options for a socket",
    "demo": "watch a guest get an address and answer pings: no root, no image",
    "capabilities": "print what this build can do",
    "install-descriptor": "make vdev known to management software",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command. -> the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--print-capabilities" in arguments:
        print(CAPABILITIES)
        return 0
    _open_standard_streams()
    from vdev.errors import Failure, Misuse

    try:
        _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except Misuse as error:
        _complain(*error.args)
        return 2
    except Failure as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not find that out again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 1


def _open_standard_streams() -> None:
    """Put /dev/null where descriptors 0, 1 or 2 were closed, lest a TAP gets that number and our log."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _complain(*lines: str) -> None:
    # Not sys.stderr: it is None when descriptor 2 was closed.
    os.write(2, "".join(f"vdev: {line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def _dispatch(arguments: list[str]) -> None:
    from vdev.errors import Misuse

    verb = arguments[0] if arguments else ""
    if not verb or verb.startswith("-"):
        listed = "".join(f"  vdev {name:19} {what}\n" for name, what in VERBS.items())
        _run(arguments, "vdev", f"verbs:\n{listed}\n")
    elif verb not in VERBS:
        raise Misuse(f"unknown verb {verb!r}; known: {', '.join(VERBS)}; `vdev --help` tells more")
    else:
        globals()["_" + verb.replace("-", "_")](arguments[1:], f"vdev {verb}")


def _run(arguments: list[str], prog: str, verbs: str = "") -> None:
    from vdev import run_options
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
    from vdev.config import QUEUE_PAIRS_MAX
    from vdev.errors import Failure, Misuse
    from vdev.qemu import QemuError, format_shell, qemu_args
    from vdev.run_options import Parser

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
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of shell words")
    options = parser.parse_args(arguments)
    pairs = options.queue_pairs
    if not (pairs.isascii() and pairs.isdecimal() and len(pairs) < 4 and 1 <= int(pairs) <= QUEUE_PAIRS_MAX):
        raise Misuse(f"--queue-pairs {pairs}: must be a number from 1 to {QUEUE_PAIRS_MAX}")
    try:
        args = qemu_args(options.socket, memory=options.memory, queue_pairs=int(pairs), qemu=options.qemu,
                         mac=options.mac, server=options.server, kvm=options.kvm)
    except QemuError as error:
        raise Failure(str(error)) from None
    if options.json:
        import json

        print(json.dumps(args))
    else:
        print(format_shell(args))


def _capabilities(arguments: list[str], prog: str) -> None:
    from vdev import descriptor
    from vdev.run_options import Parser

    parser = Parser(prog, "Print what this build can do: features, ports, limits.",
                    epilog="example:\n  vdev capabilities --json")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_args(arguments)
    found = descriptor.capabilities()
    if options.json:
        import json

        print(json.dumps(found))
        return
    for name, value in found.items():
        listed = " ".join(map(str, value)) if isinstance(value, list | dict) else value
        print(f"{name.replace('_', ' ')}: {listed}")


def _install_descriptor(arguments: list[str], prog: str) -> None:
    from vdev import descriptor
    from vdev.run_options import Parser

    parser = Parser(prog, "Write the JSON file by which management software finds back-end programs "
                    "(vhost-user, \"Backend program conventions\"), and print its path.",
                    epilog="example:\n  vdev install-descriptor --user")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--user", dest="directory", action="store_const", const=descriptor.user_directory(),
                       help=f"for this user: {descriptor.user_directory()} (the default)")
    where.add_argument("--system", dest="directory", action="store_const", const=descriptor.SYSTEM_DIRECTORY,
                       help=f"for everybody: {descriptor.SYSTEM_DIRECTORY}")
    where.add_argument("--directory", metavar="DIRECTORY", help="for packagers, e.g. a staged "
                       "/usr/share/qemu/vhost-user")
    parser.set_defaults(directory=descriptor.user_directory())
    print(descriptor.install(parser.parse_args(arguments).directory))
