"""The comma syntax that --port and --device share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdev.options import OptionError, escape, pairs, split, take


@pytest.mark.parametrize("text, fields", [
    ("a", ["a"]),
    ("", [""]),
    ("a,b=c", ["a", "b=c"]),
    ("a,,b", ["a,b"]),
    ("a,,,b", ["a,", "b"]),
    ("a,,,,b", ["a,,b"]),
    ("a,", ["a", ""]),
    (",a", ["", "a"]),
])
def test_split(text, fields):
    assert split(text) == fields


@given(st.lists(st.text(min_size=1), min_size=1))
def test_escape_makes_any_value_one_field(values):
    marked = [f"{n}{value}" for n, value in enumerate(values)]  # a field cannot begin with a comma
    assert split(",".join(escape(value) for value in marked)) == marked


def test_pairs():
    assert pairs(["a=1", "b=2=3"], "--x") == [("a", "1"), ("b", "2=3")]


@pytest.mark.parametrize("field, text", [
    ("v0", "--x: 'v0' is not KEY=VALUE"),
    ("=v0", "--x: '=v0' is not KEY=VALUE"),
    ("", "--x: '' is not KEY=VALUE"),
    ("ip=", "--x: ip= has no value"),
])
def test_pairs_misspelt(field, text):
    with pytest.raises(OptionError) as e:
        pairs([field], "--x")
    assert str(e.value).startswith(text)


def test_take():
    options = [("a", "1"), ("b", "2"), ("a", "3")]
    assert take(options, ("a", "b"), "--x", repeatable=("a",)) == {"a": ["1", "3"], "b": ["2"]}


def test_take_lists_the_known_keys():
    with pytest.raises(OptionError, match=r"^--x: unknown option c=; known: a=, b=$"):
        take([("c", "1")], ("a", "b"), "--x")
    with pytest.raises(OptionError, match=r"^--x: unknown option c=; known: it takes none$"):
        take([("c", "1")], (), "--x")


def test_take_refuses_a_second_value():
    with pytest.raises(OptionError, match=r"^--x: a= is given twice"):
        take([("a", "1"), ("a", "1")], ("a",), "--x")
