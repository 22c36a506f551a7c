"""What vdev tells management software about itself: capabilities, and the descriptor that names the program.

Source: QEMU's docs/interop/vhost-user.json and "Backend program conventions" of vhost-user.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from vdev.errors import Failure

FILE_NAME = "50-vdev.json"  # two digits that give the priority among back-ends of the same type
SYSTEM_DIRECTORY = "/etc/qemu/vhost-user"


def capabilities() -> dict[str, Any]:
    """What this build can do, by the names of the specifications: more than --print-capabilities may say."""
    from vdev import __version__
    from vdev.config import QUEUE_PAIRS_MAX
    from vdev.net import offer
    from vdev.net.features import names
    from vdev.ports.spec import KINDS
    from vhost_user.spec import QUEUE_SIZE_MAX, ProtocolFeature

    return {
        "type": "net",
        "version": __version__,
        "features": names(offer.IMPLEMENTED),
        "protocol_features": [bit.name for bit in ProtocolFeature if offer.PROTOCOL >> bit & 1],
        "ports": {kind: spec.USAGE for kind, spec in KINDS.items()},
        "rings": ["split", "packed"],
        "max_queue_pairs": QUEUE_PAIRS_MAX,
        "max_queue_size": QUEUE_SIZE_MAX,
    }


def user_directory() -> str:
    """Where QEMU's convention has descriptors of one user."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "qemu", "vhost-user")


def program() -> str:
    """The absolute path of the installed ``vdev`` command. Raises Failure when there is none."""
    beside = Path(sys.executable).with_name("vdev")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vdev")
    if found is None:
        raise Failure("there is no installed vdev command to point to; install vdev first: pip install .")
    return os.path.abspath(found)


def install(directory: str) -> str:
    """Write the descriptor into ``directory``, which is made if need be. -> its path. Raises Failure."""
    text = json.dumps({"description": "vdev virtio-net device", "type": "net", "binary": program()}, indent=2)
    return write(directory, FILE_NAME, text + "\n", "choose --user, or be root for --system")


def write(directory: str, name: str, text: str, otherwise: str) -> str:
    """Have file ``name`` with ``text`` in ``directory``, which is made if need be. -> its path.

    Raises Failure, which says what to do ``otherwise``.
    """
    path = os.path.join(directory, name)
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(directory, exist_ok=True)
        # Whoever the file is for may read the directory at any time: never half a file.
        Path(temporary).write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}; {otherwise}") from None
    return path
