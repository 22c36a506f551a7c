"""Bytes to messages: any split, and the framing violations that end a connection."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.codec import Decoder, Message, encode, encode_ack
from vhost_user.errors import Close
from vhost_user.fds import OwnedFds
from vhost_user.spec import PAYLOAD_MAX, Request

REQUEST, REPLY, NEED_REPLY = 0x1, 0x5, 0x9


def header(request=1, flags=REQUEST, size=0) -> bytes:
    return struct.pack("=III", request, flags, size)


def feed_all(decoder: Decoder, data: bytes, step: int = 1 << 30) -> list[Message]:
    """Everything in ``data``, in pieces of at most ``step`` bytes."""
    messages = []
    while data:
        piece = data[:min(step, decoder.needed)]
        data = data[len(piece):]
        message = decoder.feed(piece)
        if message is not None:
            messages.append(message)
    return messages


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_message_comes_out_as_it_went_in():
    [message] = feed_all(Decoder(), encode(Request.SET_VRING_NUM, b"12345678", need_reply=True))
    assert (message.request, message.flags, message.payload) == (8, NEED_REPLY, b"12345678")
    assert message.need_reply
    assert message.name == "SET_VRING_NUM"
    assert Message(77, 1, b"").name == "request 77"


def test_encoded_flags():
    assert encode(1)[4] == 0x1
    assert encode(1, reply=True)[4] == 0x5
    assert encode(1, need_reply=True)[4] == 0x9


@pytest.mark.parametrize(("success", "value"), [(True, 0), (False, 1)])
def test_an_acknowledgement_is_zero_for_success(success, value):
    assert encode_ack(2, success) == struct.pack("=IIIQ", 2, REPLY, 8, value)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=PAYLOAD_MAX)), max_size=5),
       st.integers(1, 400))
def test_P03_any_split_gives_the_same_messages(messages, step):
    data = b"".join(encode(request, payload) for request, payload in messages)
    decoder = Decoder()
    found = feed_all(decoder, data, step)
    assert [(message.request, message.payload) for message in found] == messages
    assert not decoder.started


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=30), st.booleans())
def test_random_bytes_raise_nothing_but_close(pieces, replies):
    decoder = Decoder(replies=replies)
    try:
        for piece in pieces:
            feed_all(decoder, piece)
    except Close:
        assert not decoder.started


@pytest.mark.parametrize("size", [PAYLOAD_MAX + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_P04_size_beyond_any_payload_closes_before_it_is_read(size):
    with pytest.raises(Close, match=f"payload size {size}"):
        Decoder().feed(header(size=size))


def test_P04_the_descriptors_of_such_a_message_are_closed():
    before = open_fds()
    with pytest.raises(Close):
        Decoder().feed(header(size=0xFFFFFFFF), OwnedFds([os.eventfd(0)]))
    assert open_fds() == before


@pytest.mark.parametrize("version", [0, 2, 3])
def test_P09_wrong_version_closes(version):
    with pytest.raises(Close, match=f"version {version} is not 1"):
        Decoder().feed(header(flags=version))


def test_P11_reply_flag_in_a_request_closes():
    with pytest.raises(Close, match="a reply came where a request was due"):
        Decoder().feed(header(flags=REPLY))


def test_a_request_where_a_reply_is_due_closes():
    with pytest.raises(Close, match="a request came where a reply was due"):
        Decoder(replies=True).feed(header(flags=REQUEST))


def test_undefined_flag_bits_are_ignored():
    assert Decoder().feed(header(flags=0xFFFFFFF0 | REQUEST)).request == 1


def test_VU_MSG_B_04_descriptors_stay_with_the_message_whose_first_byte_they_came_with():
    decoder = Decoder()
    fd = os.eventfd(0)
    data = encode(Request.SET_VRING_KICK, bytes(8))
    assert decoder.feed(data[:1], OwnedFds([fd])) is None
    [message] = feed_all(decoder, data[1:], 3)
    with message.fds as fds:
        assert fds[0] == fd
    [message] = feed_all(decoder, encode(Request.GET_FEATURES))
    assert len(message.fds) == 0


@pytest.mark.parametrize("at", [1, 11, 12, 15])
def test_P14_descriptors_on_a_later_byte_close(at):
    decoder = Decoder()
    before = open_fds()
    feed_all(decoder, encode(Request.SET_VRING_KICK, bytes(8))[:at])
    with pytest.raises(Close, match="in the middle of a message"):
        decoder.feed(b"\0", OwnedFds([os.eventfd(0)]))
    assert open_fds() == before
    assert not decoder.started


def test_P02_half_a_message_dropped_closes_its_descriptors():
    before = open_fds()
    decoder = Decoder()
    decoder.feed(b"\1", OwnedFds([os.eventfd(0)]))
    assert decoder.started
    decoder.close()
    assert open_fds() == before


def test_more_than_needed_is_refused_so_that_no_byte_of_the_next_message_is_held():
    with pytest.raises(ValueError, match="13 bytes given, 12 needed"):
        Decoder().feed(bytes(13))
