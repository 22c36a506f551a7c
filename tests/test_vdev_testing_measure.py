"""Reports of measuring programs, understood: vdev/testing/measure.py."""

import pytest

from vdev.testing.measure import MeasurementError, PingReport, TcpReport, parse_ping, round_trips

BUSYBOX = """\
PING 10.0.0.1 (10.0.0.1): 56 data bytes
64 bytes from 10.0.0.1: seq=0 ttl=64 time=0.560 ms
64 bytes from 10.0.0.1: seq=2 ttl=64 time=13.418 ms

--- 10.0.0.1 ping statistics ---
3 packets transmitted, 2 packets received, 33% packet loss
round-trip min/avg/max = 0.560/1.531/13.418 ms
"""
# The answer to the third request is late, and a fourth was sent meanwhile.
IPUTILS = """\
PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.
64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.036 ms
64 bytes from 10.0.0.1: icmp_seq=2 ttl=64 time=0.078 ms
64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=22.0 ms

--- 10.0.0.1 ping statistics ---
4 packets transmitted, 3 received, 25% packet loss, time 2003ms
rtt min/avg/max/mdev = 0.036/7.300/22.000/0.018 ms
"""
# The second answer is lost; another request brings the number of answers up.
REPLACED = IPUTILS.replace("icmp_seq=3", "icmp_seq=4").replace("icmp_seq=2", "icmp_seq=3")
SILENCE = """\
--- 10.0.0.1 ping statistics ---
2 packets transmitted, 0 packets received, 100% packet loss
"""


@pytest.mark.parametrize(("text", "report", "lost"), [
    (BUSYBOX, PingReport(3, (1,), 0.56, 1.531, 13.418), 1),
    (IPUTILS, PingReport(3, (), 0.036, 7.3, 22.0), 0),
    (REPLACED, PingReport(3, (2,), 0.036, 7.3, 22.0), 1),
    (SILENCE, PingReport(3, (0, 1, 2), None, None, None), 3),
], ids=["busybox", "iputils", "replaced", "silence"])
def test_answers_are_told_apart_by_number(text: str, report: PingReport, lost: int) -> None:
    assert parse_ping(text, 3) == report
    assert (report.lost, report.received) == (lost, 3 - lost)


def test_a_ping_without_summary_is_an_error_with_its_words() -> None:
    with pytest.raises(MeasurementError, match="bad address 'nowhere'"):
        parse_ping("ping: bad address 'nowhere'\n", 3)


def test_round_trips_are_the_times_of_the_answers() -> None:
    assert round_trips(IPUTILS) == [0.036, 0.078, 22.0] and round_trips(BUSYBOX) == [0.56, 13.418]
    with pytest.raises(MeasurementError, match="100% packet loss"):
        round_trips(SILENCE)


def test_megabits() -> None:
    assert TcpReport(bytes=250_000_000, seconds=2.0).megabits == 1000
