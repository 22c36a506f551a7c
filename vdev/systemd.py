"""The systemd units that come with vdev, and putting them where systemd finds them."""

from importlib.resources import files

from vdev.descriptor import program, write

SYSTEM_DIRECTORY = "/etc/systemd/system"
NAMES = ("vdev@.service", "vdev@.socket")


def text(name: str, command: str) -> str:
    """Unit ``name``, one of NAMES, that runs ``command``, an absolute path."""
    # systemd.service(5): a word in quotes may hold blanks; % and \ are doubled, and a quote is escaped
    quoted = command.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
    return files("vdev").joinpath("units", name).read_text().replace("@PROGRAM@", f'"{quoted}"')


def install(directory: str) -> list[str]:
    """Write the units into ``directory``, which is made if need be. -> their paths. Raises Failure."""
    command = program()
    return [write(directory, name, text(name, command), "be root, or choose another --directory") for name in NAMES]
