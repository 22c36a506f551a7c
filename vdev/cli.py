"""The ``vdev`` command: which verb was asked for, and how it ended.

Exit status: 0 fine, 1 failed, 2 misused. A user's mistake is one line on standard error that starts with
``vdev:`` (one for each mistake where several were found), never a traceback.

This module imports next to nothing: ``--print-capabilities`` is asked by management software of every
back-end it finds, and has to answer at once and under any circumstances.
"""

import os
import sys

# VHostUserBackendCapabilities of QEMU's docs/interop/vhost-user.json: its union has no branch for a net
# device, so that there is nothing to add.
CAPABILITIES = '{"type": "net"}'


def main(arguments: list[str] | None = None) -> int:
    """Run the command. -> the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--print-capabilities" in arguments:
        print(CAPABILITIES)
        return 0
    _open_standard_streams()
    from vdev import verbs
    from vdev.errors import Failure, Misuse

    try:
        verbs.dispatch(arguments)
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
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed as it was given


def _complain(*lines: str) -> None:
    from contextlib import suppress

    text = "".join(f"vdev: {line}\n" for line in lines)
    # Not sys.stderr: it is None when descriptor 2 was closed. If nobody reads, the exit status says it too.
    with suppress(OSError):
        os.write(2, text.encode("utf-8", "backslashreplace"))
