"""The virtqueue core and its data plane: one C extension, and the step API on top. Knows no sockets."""
