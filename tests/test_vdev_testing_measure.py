"""Reports of measuring programs, understood: vdev/testing/measure.py."""

import pytest

from vdev.testing.measure import MeasurementError, PingReport, TcpReport, parse_ping

BUSYBOX = """\
PING 10.0.0.1 (10.0.0.1): 56 data bytes

--- 10.0.0.1 ping statistics ---
20 packets transmitted, 19 packets received, 5% packet loss
round-trip min/avg/max = 0.560/1.531/13.418 ms
"""
IPUTILS = """\
--- 10.0.0.1 ping statistics ---
3 packets transmitted, 3 received, 0% packet loss, time 2003ms
rtt min/avg/max/mdev = 0.036/0.053/0.078/0.018 ms
"""
SILENCE = """\
--- 10.0.0.1 ping statistics ---
2 packets transmitted, 0 packets received, 100% packet loss
"""


@pytest.mark.parametrize(("text", "report"), [
    (BUSYBOX, PingReport(20, 19, 0.56, 1.531, 13.418)),
    (IPUTILS, PingReport(3, 3, 0.036, 0.053, 0.078)),
    (SILENCE, PingReport(2, 0, None, None, None)),
], ids=["busybox", "iputils", "silence"])
def test_ping_summary(text: str, report: PingReport) -> None:
    assert parse_ping(text) == report
    assert parse_ping(text).lost == report.sent - report.received


def test_a_ping_without_summary_is_an_error_with_its_words() -> None:
    with pytest.raises(MeasurementError, match="bad address 'nowhere'"):
        parse_ping("ping: bad address 'nowhere'\n")


def test_megabits() -> None:
    assert TcpReport(bytes=250_000_000, seconds=2.0).megabits == 1000
