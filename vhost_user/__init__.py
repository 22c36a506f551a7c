"""The vhost-user control protocol, both halves, knowing no ring, no network and no device.

spec, wire      numbers and layouts
codec           bytes to messages
requests        one row for each request: layout, descriptors, gate, rule, effect, reply
state, effects  what a session has agreed on, and what changes it
rules           what each request must satisfy
session         accept() and answer(): the back-end's half, without I/O
transport       the socket
frontend        QEMU's half, for tests and tools
"""
