"""What testpmd prints, understood: vdev/testing/testpmd.py. With the program itself: tests/interop/test_testpmd.py."""

import pytest

from vdev.testing.testpmd import Counters, Placement, Rings, parse_counters

PORT = """\
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 1              RX-dropped: 0             RX-total: 1
  TX-packets: 2              TX-dropped: 3             TX-total: 5
  ----------------------------------------------------------------------------

"""
SUMS = """\
  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 417888         RX-dropped: 0             RX-total: 417888
  TX-packets: 417856         TX-dropped: 32            TX-total: 417888
  ++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++++
"""
CYCLES = """
  CPU cycles/packet=950.25 (total cycles=397096046 / total io packets=417888) at 2500 MHz Clock
"""


def test_counters_are_the_sums_and_cycles_are_seconds() -> None:
    counters = parse_counters(PORT + SUMS + CYCLES)
    assert counters == Counters(417888, 417856, 32, pytest.approx(397096046 / 2.5e9), 2.5e9)


def test_without_recorded_cycles_it_was_never_busy() -> None:
    assert parse_counters(PORT + SUMS).busy_seconds == 0.0


def test_an_answer_without_sums_is_an_error_with_its_words() -> None:
    with pytest.raises(ValueError, match="Bad arguments"):
        parse_counters("Bad arguments\n")


def test_what_was_counted_since() -> None:
    assert Counters(10, 20, 30, 4.0, 5.0).since(Counters(1, 2, 3, 0.5, 5.0)) == Counters(9, 18, 27, 3.5, 5.0)


def test_a_prompt_and_a_poller_may_share_a_processor() -> None:
    assert Placement(1, 1).environment() == ["--lcores", "0@1,1@1", "--main-lcore", "0", "--no-huge", "-m", "256"]
    assert "--no-huge" not in Placement(1, 0, huge=True).environment()


def test_a_port_in_words_of_dpdk() -> None:
    words = Rings(packed=True, size=1024).front_end(3, "/tmp/a.sock", mac="02:00:00:00:00:07")
    assert words == ("net_virtio_user3,path=/tmp/a.sock,queues=1,queue_size=1024,mrg_rxbuf=1,packed_vq=1,in_order=0,"
                     "vectorized=0,mac=02:00:00:00:00:07")
