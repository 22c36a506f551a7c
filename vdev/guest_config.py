"""The configuration space over one session, for front-ends that leave it to the device: who reads, writes, is told.

vhost-user, GET_CONFIG, SET_CONFIG and CONFIG_CHANGE_MSG; what is in it: vdev/net/config_space.py. What changes here is
announced over the back-end's channel; what changed while there was none is announced when there is one.
"""

from dataclasses import replace
from typing import Any

from vdev.net.config_space import SIZE, ConfigSpace, mac_after
from vdev.reverse import ReverseChannel
from vdev.session_rings import Refuse
from vhost_user.session import Session
from vhost_user.spec import BackendRequest, ConfigWrite, ProtocolFeature
from vhost_user.wire import Config


class GuestConfig:
    """The configuration space of one session, which begins as ``space``."""

    def __init__(self, space: ConfigSpace, session: Session, reverse: ReverseChannel) -> None:
        self.space = space
        self._first = space
        self._session = session
        self._reverse = reverse
        self._untold = False  # something changed, and there was no channel

    @property
    def mtu(self) -> int:
        """What a driver reads that was offered MTU: what the front-end has set, else what we have, in bytes."""
        return self._session.state.mtu or self.space.mtu

    def _bytes(self) -> bytes:
        return replace(self.space, mtu=self.mtu).encode(self._session.offer.features)

    def read(self, wanted: Config) -> bytes:
        """GET_CONFIG. Raises Refuse."""
        end = wanted.offset + len(wanted.data)
        if end > SIZE:
            raise Refuse(f"bytes {wanted.offset} to {end} are not all within the {SIZE} of a network device's "
                                "configuration space; the front-end must ask for what is there")
        return self._bytes()[wanted.offset:end]

    def write(self, config: Config) -> None:
        """SET_CONFIG. A driver may write nothing (virtio 1.2, 5.1.4); with a guest that moves comes its address. Raises
        Refuse."""
        if config.flags == ConfigWrite.DRIVER:
            raise Refuse("every field is read-only for a driver that has accepted VERSION_1; the guest's driver "
                                "changes its address by the control queue")
        try:
            mac = mac_after(self._bytes(), config.offset, config.data)
        except ValueError as error:
            raise Refuse(f"{error}; give this vdev the options of the one the guest comes from") from None
        self.space = replace(self.space, mac=mac)

    def update(self, **fields: Any) -> None:
        """Have these fields of the space say something else, as the driver knows."""
        self.space = replace(self.space, **fields)

    def change(self, **fields: Any) -> None:
        """Have these fields of the space say something else, and have the driver told."""
        changed = replace(self.space, **fields)
        if changed != self.space:
            self.space = changed
            self._tell()

    def reset(self) -> None:
        """The device was reset: what its driver has changed is as it was at first. Nobody is told."""
        self.space = replace(self.space, mac=self._first.mac, announce=False)

    def _tell(self) -> None:
        wanted = self._session.state.has(ProtocolFeature.CONFIG)
        self._untold = wanted and not self._reverse.send(BackendRequest.CONFIG_CHANGE_MSG, b"")

    def channel_changed(self) -> None:
        """There is a channel, or another one."""
        if self._untold:
            self._tell()
