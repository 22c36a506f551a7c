"""vdev: a userspace virtio-net device, served to a VMM over the vhost-user protocol."""


def __getattr__(name: str) -> str:
    # Reading package metadata costs more than the whole of --print-capabilities: only on demand.
    if name == "__version__":
        from importlib.metadata import version

        return version("vdev")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
