"""What --port may say."""

from ipaddress import ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdev.options import OptionError, pairs, split
from vdev.ports.spec import (
    KINDS,
    LoopbackSpec,
    NullSpec,
    ResponderSpec,
    TapSpec,
    parse_port,
    take_port,
)


@pytest.mark.parametrize("text, spec", [
    ("tap:v0", TapSpec("v0")),
    ("tap:", TapSpec("vdev%d")),
    ("tap:lab%d", TapSpec("lab%d")),
    ("tap:v0,ip=10.0.0.1/24,bridge=br0", TapSpec("v0", None, (ip_interface("10.0.0.1/24"),), "br0")),
    ("tap:v0,ip=10.0.0.1/24,ip=fd00::1/64",
     TapSpec("v0", None, (ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64")))),
    ("tap:fd=7", TapSpec("", 7)),
    ("responder", ResponderSpec()),
    ("responder:", ResponderSpec()),
    ("responder:192.168.9.1/28", ResponderSpec(ip_interface("192.168.9.1/28"))),
    ("loopback:", LoopbackSpec()),
    ("null:", NullSpec()),
    ("null", NullSpec()),
])
def test_specs(text, spec):
    assert parse_port(text) == spec
    assert parse_port(str(spec)) == spec


@pytest.mark.parametrize("text, part", [
    ("v0", "unknown kind of port 'v0' (for a TAP device of that name: tap:v0); known: tap:NAME"),
    ("tun:v0", "unknown kind of port 'tun'; known: tap:NAME"),
    ("", "unknown kind of port ''; known:"),
    ("tap:v0,mtu=9000", "unknown option mtu=; known: ip=, bridge="),
    ("tap:v0,br0", "'br0' is not KEY=VALUE"),
    ("tap:v0,bridge=a,bridge=b", "bridge= is given twice"),
    ("tap:sixteen-bytes-xx", "longer than 15 bytes"),
    ("tap:v0,bridge=sixteen-bytes-xx", "bridge name 'sixteen-bytes-xx' is longer than 15 bytes"),
    ("tap:a/b", "'a/b' cannot name a network interface"),
    ("tap:..", "'..' cannot name a network interface"),
    ("tap:a%d%d", "cannot name a network interface"),
    ("tap:a%s", "cannot name a network interface"),
    ("tap:a b", "cannot name a network interface"),
    ("tap:fd=x", "fd=x is not the number of an open file descriptor"),
    ("tap:fd=", "is not the number of an open file descriptor"),
    ("tap:fd=-1", "is not the number of an open file descriptor"),
    ("tap:fd=3,ip=10.0.0.1/24", "tap:fd=N takes no other option"),
    ("tap:v0,ip=10.0.0.1", "'10.0.0.1' is not ADDRESS/PREFIX, e.g. 10.0.0.1/24"),
    ("tap:v0,ip=10.0.0.256/24", "'10.0.0.256/24' is not ADDRESS/PREFIX"),
    ("tap:v0,ip=10.0.0.1/33", "is not ADDRESS/PREFIX"),
    ("tap:v0,ip=fe80::1%eth0/64", "is not ADDRESS/PREFIX"),
    ("responder:10.0.0.0/24", "leaves no room for a guest"),
    ("responder:10.0.0.255/24", "leaves no room for a guest"),
    ("responder:10.0.0.1/31", "leaves no room for a guest"),
    ("responder:fd00::1/64", "fd00::1/64 is IPv6"),
    ("responder:,dns=1.1.1.1", "unknown option dns=; known: it takes none"),
    ("loopback:x", "loopback: takes nothing after the colon, not 'x'"),
    ("null:,a=b", "unknown option a=; known: it takes none"),
])
def test_misspelt(text, part):
    with pytest.raises(OptionError) as e:
        parse_port(text)
    line = str(e.value)
    assert line.startswith(f"--port {text}: ") and part in line and "\n" not in line


def test_an_unknown_kind_lists_all_kinds():
    with pytest.raises(OptionError) as e:
        parse_port("x:")
    for kind in KINDS.values():
        assert kind.USAGE in str(e.value)


def _device(text):
    return take_port(pairs(split(text), "--device"), "--device")


def test_port_and_device_keys_mix_in_any_order():
    spec, rest = _device("ip=10.0.0.1/24,socket=/run/a,,b.sock,port=tap:v0,features=+mq,bridge=br0")
    assert spec == parse_port("tap:v0,ip=10.0.0.1/24,bridge=br0")
    assert rest == [("socket", "/run/a,b.sock"), ("features", "+mq")]


def test_a_device_without_a_port():
    assert _device("socket=/run/a.sock") == (None, [("socket", "/run/a.sock")])


@pytest.mark.parametrize("text, part", [
    ("socket=/x,ip=10.0.0.1/24", "--device: ip= belongs to a port; add port=KIND:..."),
    ("port=null:,port=null:", "--device: port= is given twice"),
    ("port=null:,ip=10.0.0.1/24", "--device: unknown option ip=; known: it takes none"),
    ("port=zebra:", "--device: unknown kind of port 'zebra'"),
])
def test_a_device_whose_port_is_misspelt(text, part):
    with pytest.raises(OptionError) as e:
        _device(text)
    assert str(e.value).startswith(part)


@given(st.text(st.sampled_from("tapresondlbcku:,=%/.0123456789abcdefv ")))
def test_any_text_gives_a_spec_or_an_option_error(text):
    try:
        spec = parse_port(text)
    except OptionError:
        return
    assert parse_port(str(spec)) == spec
