"""Frozen dataclasses to JSON and back, checked against their type hints: what one vdev tells the next.

What is written can be read by a person: a dataclass is an object with the names of its fields, an enum its name,
bytes are hexadecimal digits, an address its text, a tuple an array, a dict an array of pairs.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from enum import Enum, IntFlag
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface
from typing import Any, Union, get_args, get_origin, get_type_hints

_TEXTS = (IPv4Address, IPv4Interface, IPv6Interface)


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def to_plain(value: Any) -> Any:
    """``value`` as JSON types. Raises TypeError for what this module does not know."""
    kind = type(value)
    if value is None or kind in (int, str, bool, float):
        return value
    if dataclasses.is_dataclass(kind):
        return {name: to_plain(getattr(value, name)) for name in _names(kind)}
    if isinstance(value, int):  # an IntFlag
        return int(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, _TEXTS):
        return str(value)
    if kind is tuple:
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return [[to_plain(key), to_plain(item)] for key, item in value.items()]
    raise TypeError(f"{type(value).__name__} cannot be handed on")


def from_plain(kind: Any, data: Any, where: str = "state") -> Any:
    """The value of type ``kind`` (a class, or a hint such as ``tuple[Region, ...]``) that ``data`` stands for.

    Raises ValueError naming the place for data that is no such value: fields that are missing or unknown, too.
    """
    try:
        return _reader(kind)(data)
    except _Misfit as misfit:
        raise ValueError(f"{where}{misfit.place}: {misfit.reason}") from None


class _Misfit(Exception):
    """Data that does not fit; ``place`` grows on the way out, so that nothing is spent on it where all is well."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.place = ""


_Reader = Callable[[Any], Any]


@functools.cache
def _reader(kind: Any) -> _Reader:
    """What makes a ``kind`` of data. Made once a type: hints are slow to look through, and frames stand still meanwhile
    (vdev/upgrade.py)."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda data: data
    if origin in (Union, types.UnionType):
        (other,) = (argument for argument in arguments if argument is not type(None))  # no other union is in use
        inner = _reader(other)
        return lambda data: None if data is None else inner(data)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _fixed([_reader(argument) for argument in arguments])
    if origin is tuple:
        return _array(_reader(arguments[0]))
    if origin is dict:
        return _pairs(*map(_reader, arguments))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return _object(kind, {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)})
    return _scalar(kind)


def _inside(read: _Reader, data: Any, place: str) -> Any:
    try:
        return read(data)
    except _Misfit as misfit:
        misfit.place = place + misfit.place
        raise


def _need_list(data: Any) -> None:
    if not isinstance(data, list):
        raise _Misfit("not an array")


def _array(item: _Reader) -> _Reader:
    def read(data: Any) -> tuple:
        _need_list(data)
        return tuple([_inside(item, value, f"[{number}]") for number, value in enumerate(data)])
    return read


def _fixed(items: list[_Reader]) -> _Reader:
    def read(data: Any) -> tuple:
        _need_list(data)
        if len(data) != len(items):
            raise _Misfit(f"{len(data)} items, not {len(items)}")
        return tuple([_inside(item, value, f"[{number}]")
                      for number, (item, value) in enumerate(zip(items, data, strict=True))])
    return read


def _pairs(key: _Reader, value: _Reader) -> _Reader:
    def read(data: Any) -> dict:
        _need_list(data)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in data):
            raise _Misfit("not an array of pairs")
        return {_inside(key, name, "[]"): _inside(value, found, f"[{name}]") for name, found in data}
    return read


def _object(kind: type, fields: dict[str, _Reader]) -> _Reader:
    places = {name: f".{name}" for name in fields}

    def read(data: Any) -> Any:
        if not isinstance(data, dict) or data.keys() != fields.keys():
            raise _Misfit(f"not an object with exactly the fields {', '.join(fields)}")
        return kind(**{name: _inside(item, data[name], places[name]) for name, item in fields.items()})
    return read


def _scalar(kind: type) -> _Reader:
    def misfit(data: Any) -> _Misfit:
        return _Misfit(f"{type(data).__name__} where {kind.__name__} is due")

    def exact(data: Any) -> Any:
        if type(data) is not kind:
            raise misfit(data)
        return data

    def number(data: Any) -> float:
        if type(data) not in (int, float):
            raise misfit(data)
        return float(data)

    def flags(data: Any) -> IntFlag:
        if type(data) is not int:
            raise misfit(data)
        return kind(data)

    def named(data: Any) -> Enum:
        if not isinstance(data, str) or data not in kind.__members__:
            raise misfit(data)
        return kind[data]

    def text(data: Any) -> Any:
        if not isinstance(data, str):
            raise misfit(data)
        try:
            return bytes.fromhex(data) if kind is bytes else kind(data)
        except ValueError:
            raise _Misfit(f"{data[:40]!r} is no {kind.__name__}") from None

    if kind is float:
        return number
    if issubclass(kind, IntFlag):
        return flags
    if issubclass(kind, Enum):
        return named
    return text if kind is bytes or kind in _TEXTS else exact
