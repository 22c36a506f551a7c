"""Devices of one daemon on one switch: scripted guests that talk through it, and to the host through an uplink."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev import switches
from vdev.config import UplinkConfig
from vdev.errors import Failure
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.ports import PortError
from vdev.ports.spec import TapSpec
from vdev.ports.switch import Switch, SwitchPort
from vdev.testing.daemon import Daemon
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import WirePort
from vdev.testing.waiting import wait_until
from vdev.workers import Worker, WorkerLost, Workers

BROADCAST = b"\xff" * 6
TYPE = b"\x88\xb5"  # IEEE 802: local experiments


def mac(n: int) -> bytes:
    """The address of station n."""
    return bytes([2, 0, 0, 0, 0, n])


def frame(to: bytes, source: bytes, payload: bytes) -> bytes:
    return to + source + TYPE + payload.ljust(46, b"\0")


@contextlib.contextmanager
def stations(tmp_path: Path, count: int, *options: str,
             **of_daemon: object) -> Iterator[tuple[Daemon, list[ScriptedGuest]]]:
    """A daemon with ``count`` guests at the switch ``lan``; they are connected."""
    paths = [str(tmp_path / f"{n}.sock") for n in range(count)]
    devices = [f"--device=socket={path},port=switch:lan" for path in paths]
    with Daemon([*devices, *options], **of_daemon) as daemon, contextlib.ExitStack() as stack:
        yield daemon, [stack.enter_context(joined(path)) for path in paths]


def joined(path: str) -> ScriptedGuest:
    """A guest whose rings run: what it sent last is answered."""
    guest = ScriptedGuest.connect(path)
    guest.front_end.get_features()
    return guest


def received(guest: ScriptedGuest, seconds: float = 5) -> bytes | None:
    got = guest.driver.receive_within(seconds)
    return got and got.frame


@pytest.mark.parametrize("options", [(), ("--workers=direction",), ("--workers=1", "--poll-us=100")],
                         ids=["worker_each", "split", "shared_polling"])
def test_guests_of_one_daemon_exchange_frames(tmp_path: Path, options: tuple[str, ...]) -> None:
    with stations(tmp_path, 3, *options) as (daemon, guests):
        first = frame(BROADCAST, mac(0), b"who is there")
        guests[0].driver.transmit(first)
        assert received(guests[1]) == first
        assert received(guests[2]) == first
        answer = frame(mac(0), mac(1), b"me")
        guests[1].driver.transmit(answer)
        assert received(guests[0]) == answer
        direct = frame(mac(1), mac(0), b"for you alone")
        guests[0].driver.transmit(direct)
        assert received(guests[1]) == direct
        assert received(guests[2], 0.2) is None
        for guest in guests:
            guest.close()
    ended = daemon.events("session-end")
    assert [line["device"] for line in ended] != []
    by_name = {line["device"]: line for line in ended}
    assert by_name["net0"]["from_guest"]["frames"] == 2
    assert by_name["net1"]["to_guest"]["frames"] == 2
    assert by_name["net2"]["to_guest"]["frames"] == 1
    assert not any(line[way]["dropped"] for line in by_name.values() for way in ("from_guest", "to_guest"))


def test_a_guest_that_is_gone_gets_nothing_and_comes_back(tmp_path: Path) -> None:
    with stations(tmp_path, 3) as (daemon, guests):
        hello = frame(BROADCAST, mac(1), b"hello")
        guests[1].driver.transmit(hello)
        assert received(guests[0]) == received(guests[2]) == hello
        guests[1].close()
        lost = frame(mac(1), mac(0), b"flooded, for its place is forgotten")
        assert _until(lambda: _sent_and_seen(guests[0], guests[2], lost))
        with joined(str(tmp_path / "1.sock")) as again:
            assert _until(lambda: _sent_and_seen(guests[0], again, frame(BROADCAST, mac(0), b"back?")))


def _sent_and_seen(sender: ScriptedGuest, receiver: ScriptedGuest, sent: bytes) -> bool:
    sender.driver.transmit(sent)
    return received(receiver, 1) == sent


def _until(condition, tries: int = 20) -> bool:
    return any(condition() for _ in range(tries))


def test_an_uplink_joins_the_host(tmp_path: Path) -> None:
    if why := why_no_tap():
        pytest.skip(f"no TAP in a namespace: {why}")
    with Namespace() as namespace, \
            stations(tmp_path, 2, "--uplink", "lan=tap:lan0,ip=10.77.0.1/24", namespace=namespace) as (daemon, guests):
        request = _arp(mac(0), "10.77.0.2", "10.77.0.1")
        guests[0].driver.transmit(request)
        _wait_for(guests[1], request.__eq__)  # a broadcast goes to all
        answer = _wait_for(guests[0], lambda f: f[12:14] == b"\x08\x06" and f[20:22] == b"\0\2")
        assert answer[:6] == mac(0)
        host = answer[6:12]
        ping = _echo(host, mac(0), "10.77.0.2", "10.77.0.1")
        guests[0].driver.transmit(ping)
        echo = _wait_for(guests[0], lambda f: f[12:14] == b"\x08\0" and f[23] == 1 and f[34] == 0)
        assert echo[38:] == ping[38:]
        for guest in guests:
            guest.close()
    counted = daemon.events("uplink-ended")[0]["traffic"]
    assert counted["to_network"]["frames"] >= 2 and counted["from_network"]["frames"] >= 2


def test_an_uplink_comes_back(tmp_path: Path) -> None:
    if why := why_no_tap():
        pytest.skip(f"no TAP in a namespace: {why}")
    with Namespace() as namespace, \
            stations(tmp_path, 1, "--uplink", "lan=tap:lan0,ip=10.77.0.1/24", namespace=namespace) as (daemon, guests):
        namespace.run(["ip", "link", "del", "lan0"])
        request = _arp(mac(0), "10.77.0.2", "10.77.0.1")

        def answered() -> bool:
            guests[0].driver.transmit(request)
            got = guests[0].driver.receive_within(0.5)
            return bool(got) and got.frame[12:14] == b"\x08\x06" and got.frame[20:22] == b"\0\2"

        assert _until(answered)
        assert daemon.events("uplink-gone")
        wait_until(lambda: daemon.events("uplink-back"), daemon.child.log)  # which is told after frames move


@pytest.fixture
def uplinked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[switches.Switches, WirePort, Loop]]:
    """A switch whose uplink is a wire, not started; the wire's other end; and a loop for it, which does not run."""
    wire, loop = WirePort(), Loop(print)
    monkeypatch.setattr(switches, "open_port", lambda spec, pairs: wire)
    every = switches.Switches(Workers())
    every.open_uplink(UplinkConfig("lan", TapSpec()), EventLog())
    yield every, wire, loop
    every.close()
    loop.close()


def stuck(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many times a worker takes no lane."""
    left, attach = [None] * times, Worker.attach

    def attach_or_not(self, lane):
        if left:
            left.pop()
            raise WorkerLost("it did not take a queue within 1 s")
        return attach(self, lane)

    monkeypatch.setattr(Worker, "attach", attach_or_not)


def test_an_uplink_whose_worker_is_stuck_ends_the_start_in_one_line(uplinked, monkeypatch) -> None:
    every, _, loop = uplinked
    stuck(monkeypatch, 1)
    with pytest.raises(Failure, match="^uplink wire: of switch:lan cannot be started: it did not take a queue"):
        every.start(loop)


def test_an_uplink_whose_worker_is_stuck_when_it_comes_back_is_tried_again(uplinked, monkeypatch, caplog) -> None:
    every, wire, loop = uplinked
    monkeypatch.setattr(switches, "RETRY_SECONDS", 0.01)
    every.start(loop)
    stuck(monkeypatch, 2)
    wire.comes_back = True
    wire.cut()
    deadline = time.monotonic() + 20

    def look() -> None:
        if caplog.messages[-1:] == ["uplink wire: of switch:lan is back"] or time.monotonic() > deadline:
            loop.stop()
        loop.call_later(0.01, look)

    look()
    with caplog.at_level("INFO", "vdev"):
        loop.run()
    assert [message.partition(" switch:lan ")[2] for message in caplog.messages] == [
        "is gone: frames to it are dropped until it is back; was the interface deleted?",
        *2 * ["is back and cannot be served yet: it did not take a queue within 1 s"], "is back"]
    wire.wire[0].send(bytes(12) + frame(BROADCAST, mac(1), b""))
    (uplink,) = every._uplinks
    wait_until(lambda: uplink.stats()[0].dropped == {"no_receiver": 1}, lambda: str(uplink.stats()))


def _wait_for(guest: ScriptedGuest, wanted, tries: int = 50) -> bytes:
    for _ in range(tries):
        got = received(guest)
        assert got is not None
        if wanted(got):
            return got
    raise AssertionError("the frame did not come")


def _arp(source: bytes, of: str, asks: str) -> bytes:
    from scapy.layers.l2 import ARP, Ether

    return bytes(Ether(src=source, dst=BROADCAST) / ARP(hwsrc=source, psrc=of, pdst=asks)).ljust(60, b"\0")


def _echo(to: bytes, source: bytes, of: str, host: str) -> bytes:
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.l2 import Ether

    return bytes(Ether(src=source, dst=to) / IP(src=of, dst=host) / ICMP(id=7, seq=1) / (b"vdev" * 10))


@pytest.mark.parametrize("options, words", [
    (["--device=socket=a.sock,port=switch:lan,postcopy=on"], "postcopy does not go with switch:lan"),
    (["--device=socket=a.sock,port=switch:lan", "--upgrade-path", "up.sock"],
     "--upgrade-path does not go with switch:lan"),
    (["--device=socket=a.sock,port=null:", "--uplink", "lan=tap:x"], "no device is at that switch"),
    (["--device=socket=a.sock,port=switch:lan", "--uplink", "lan=responder"], "an uplink is a TAP"),
    (["--device=socket=a.sock,port=switch:lan", "--uplink", "tap:x"], "must be NAME=PORT"),
    (["--socket-path=a.sock", "--port=switch:"], "cannot name a switch"),
])
def test_what_does_not_go_with_a_switch_is_said(options: list[str], words: str,
                                                capfd: pytest.CaptureFixture[str]) -> None:
    from vdev.cli import main

    assert main(["run", *options, "--check-config"]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_a_command_line_does_not_wait_for_the_c_core() -> None:
    loaded = subprocess.run([sys.executable, "-c", "import sys, vdev.run_options; print('ring._core' in sys.modules)"],
                            capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "False\n"


def test_a_device_goes_on_as_another_member_when_a_worker_is_stuck() -> None:
    switch = Switch("lan")
    other, port = SwitchPort(switch, 1), SwitchPort(switch, 1)
    stuck = port.member
    for member in (other.member, stuck):
        member.spread(1)
    stuck.learn(mac(7))
    port.abandoned()
    assert port.member.number not in (stuck.number, other.member.number)
    port.announce(mac(7))
    assert stuck.fabric.find(mac(7)) == port.member.number
    port.close()
    assert SwitchPort(switch, 1).member.number != stuck.number  # whose place stays the worker's


def test_a_switch_has_so_many_ports() -> None:
    switch = Switch("lan")
    ports = [SwitchPort(switch, 1) for _ in range(64)]
    with pytest.raises(PortError, match="switch:lan: a switch has 64 members at the most; put some devices on"):
        SwitchPort(switch, 1)
    for port in ports:
        port.close()
    switch.close()


def test_a_file_can_say_all_of_it(tmp_path: Path) -> None:
    from vdev.config import build

    file = tmp_path / "vdev.toml"
    file.write_text('uplink = ["lan=tap:lan0,ip=10.0.0.1/24"]\n' + "".join(
        f'[[device]]\nsocket = {json.dumps(str(tmp_path / name))}\nport = "switch:lan"\n' for name in "ab"))
    config = build({}, {}, {}, file=str(file))
    assert [str(device.port) for device in config.devices] == ["switch:lan", "switch:lan"]
    assert [(uplink.switch, str(uplink.port)) for uplink in config.uplinks] == [("lan", "tap:lan0,ip=10.0.0.1/24")]
