"""Conformance of any vhost-user net back-end, seen from its socket: ``vdev check SOCKET``.

Theory of operation. The table rows.tsv has a row for each requirement of the virtio and the vhost-user specification
that a device or back-end has to meet. A check (vdev/conformance/checks/) is a function about one row: it opens sessions
of a bench (bench.py), each a fresh connection brought to some stage by a front-end that behaves, does what the row is
about, and says what is wrong by raising Broken. Its docstring tells a person what it does. The runner (run.py) makes a
verdict of how it ended, and has an eye on whether the back-end still lives.

The suite knows the device by its socket only: it has the front-end of vhost_user/frontend.py, the driver of
ring/driver.py, and where told how a wire (wire.py) on the other side of the back-end. Nothing of vdev's own device is
imported, so that a mistake of the device cannot be one of the suite as well.
"""
