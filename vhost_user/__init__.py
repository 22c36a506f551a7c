"""The vhost-user control protocol, both halves, knowing no ring, no network and no device.

spec, wire      numbers and layouts
codec           bytes to messages
requests        one row for each request: layout, descriptors, gate, rule, effect, reply
state, effects  what a session has agreed on, and what changes it
rules           what each request must satisfy
session         accept() and answer(): the back-end's half, without I/O
fds, errors     who owns a descriptor; what a peer's mistake leads to
transport       the socket
frontend        the front-end's half, for tests and tools
handshake       what QEMU and DPDK send through it, in their order
"""
