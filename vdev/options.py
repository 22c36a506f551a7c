"""The comma syntax of ``--port`` and ``--device``: ``first,key=value,key=value``, ``,,`` for a comma.

As in QEMU, a value that contains a comma writes it twice. Splitting is the same for every option that
uses the syntax; what the keys mean is the business of whoever takes them (vdev/ports/spec.py,
vdev/config.py).
"""

import re
from collections.abc import Iterable, Sequence

Pairs = list[tuple[str, str]]


class OptionError(ValueError):
    """An option is misspelt. The text is one line: what, and what would be right."""


def split(text: str) -> list[str]:
    """The fields of ``text`` between single commas, with ``,,`` turned into ``,``.

    A comma run is read from the left, so ``a,,,b`` is ``a,`` and ``b``. An empty text is one empty field.
    """
    fields = [""]
    for part in re.split("(,,?)", text):
        if part == ",":
            fields.append("")
        else:
            fields[-1] += "," if part == ",," else part
    return fields


def escape(value: str) -> str:
    """``value`` as it must be written inside a comma-separated option (ours or QEMU's)."""
    return value.replace(",", ",,")


def pairs(fields: Iterable[str], where: str) -> Pairs:
    """``key=value`` fields as (key, value), in order. ``where`` names the option in the error.

    Raises OptionError for a field without ``=``, an empty key or an empty value.
    """
    found = []
    for field in fields:
        key, equals, value = field.partition("=")
        if not key or not equals:
            raise OptionError(f"{where}: {field!r} is not KEY=VALUE (write a comma inside a value twice)")
        if not value:
            raise OptionError(f"{where}: {key}= has no value; write {key}=VALUE or leave it out")
        found.append((key, value))
    return found


def take(options: Pairs, known: Sequence[str], where: str,
         repeatable: Sequence[str] = ()) -> dict[str, list[str]]:
    """The values of each key of ``options``, in order of appearance: ``{key: [value, ...]}``.

    Raises OptionError for a key outside ``known`` (the error lists them) and for a key given twice that
    is not in ``repeatable``.
    """
    taken: dict[str, list[str]] = {}
    for key, value in options:
        if key not in known:
            listed = ", ".join(f"{name}=" for name in known) if known else "it takes none"
            raise OptionError(f"{where}: unknown option {key}=; known: {listed}")
        if key in taken and key not in repeatable:
            raise OptionError(f"{where}: {key}= is given twice; give it once")
        taken.setdefault(key, []).append(value)
    return taken
