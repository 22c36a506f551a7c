"""A guest of user-mode Linux: a kernel that is a program, whose network device is all vdev's.

It needs no virtual machine and boots in a second. Its virtio_uml driver leaves configuration space and control queue to
the back-end. The image is made by ``tools/guest-image --uml``.
"""

import socket
import tempfile
from pathlib import Path

from vdev.testing.console import Console
from vdev.testing.guest import Image, ObedientGuest
from vdev.testing.process import Child


class UmlGuest(ObedientGuest):
    """A running guest; a context manager. The constructor returns when the guest obeys commands.

    image: what it boots. path: the socket of a back-end. memory: as user-mode Linux takes it.
    """

    def __init__(self, image: Image, path: Path | str, memory: str = "96M") -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="vdev-uml-")  # noqa: SIM115 - lives as long as the guest
        serial, guests = socket.socketpair()
        with guests:
            fd = guests.fileno()
            self._child = Child([str(image.kernel), f"mem={memory}", f"initrd={image.initrd}",
                                 f"virtio_uml.device={path}:1", f"ssl0=fd:{fd}", "con=null", "con0=null,fd:2",
                                 "quiet", "panic=-1", f"uml_dir={self._folder.name}"], pass_fds=[fd])
        self.console = Console(serial)
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise

    @property
    def child(self) -> Child:
        return self._child

    def stop(self) -> int:
        """End it at once, as nothing of it outlives it. Returns the exit status; may be called again."""
        status = self._child.kill()
        self.console.close()
        self._folder.cleanup()
        return status

    def __enter__(self) -> "UmlGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
