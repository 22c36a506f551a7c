"""The commands of the control queue: bytes in, an answer and new settings out, without I/O (virtio 1.2, 5.1.6.5)."""
