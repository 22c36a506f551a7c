"""vdev/config.py: one configuration from command line and file, and every mistake in it."""

import pytest

from vdev import run_options
from vdev.config import QUEUE_PAIRS_MAX, DaemonConfig, DeviceConfig
from vdev.errors import Misuse
from vdev.features_option import FeatureEdit
from vdev.listen import PATH_MAX
from vdev.net.features import Feature, mask
from vdev.ports.spec import NullSpec, TapSpec, parse_port


def configure(*arguments: str, passed: list[int] | None = None) -> DaemonConfig:
    words = run_options.join_features(arguments)
    return run_options.configure(run_options.parser("vdev").parse_args(words), passed or [])


def mistakes(*arguments: str, passed: list[int] | None = None) -> list[str]:
    with pytest.raises(Misuse) as caught:
        configure(*arguments, passed=passed)
    return list(caught.value.args)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "vm.toml"
        path.write_text(text)
        return str(path)
    return write


# ---------------------------------------------------------------------------------- command line


def test_socket_path_alone_is_enough():
    assert configure("--socket-path", "/run/x.sock") == DaemonConfig(
        devices=(DeviceConfig("net0", socket_path="/run/x.sock"),))


def test_fd_alone_is_enough():
    assert configure("--fd=3") == DaemonConfig(devices=(DeviceConfig("net0", fd=3),))


def test_everything_on_the_command_line():
    config = configure(
        "--socket-path=/run/x.sock", "--port", "tap:v0,ip=10.0.0.1/24,bridge=br0", "--queue-pairs", "4",
        "--features", "-mrg_rxbuf,+csum", "--personality", "full", "--socket-group", "kvm", "--socket-mode", "600",
        "--postcopy", "--one-off", "--ready-fd", "7", "--log-format", "json", "-v", "--workers", "direction",
        "--cpus", "3,0", "--poll-us", "50")
    assert config == DaemonConfig(
        devices=(DeviceConfig("net0", socket_path="/run/x.sock", socket_group="kvm", socket_mode=0o600,
                              port=parse_port("tap:v0,ip=10.0.0.1/24,bridge=br0"), queue_pairs=4,
                              features=FeatureEdit(mask(Feature.CSUM), mask(Feature.MRG_RXBUF)),
                              personality="full", postcopy=True),),
        one_off=True, ready_fd=7, log_format="json", log_level="debug", workers="direction", cpus=(3, 0), poll_us=50)


def test_client():
    assert configure("--socket-path", "/x", "--client").devices[0].client


def test_features_value_that_starts_with_a_dash():
    for words in (["--features", "-mrg_rxbuf"], ["--features=-mrg_rxbuf"]):
        assert configure("--fd", "3", *words).devices[0].features.remove == mask(Feature.MRG_RXBUF)


def test_several_devices():
    config = configure("--device", "socket=/a,port=tap:a,ip=10.0.0.1/24,queue-pairs=2,features=-mq,,-csum",
                       "--device", "name=second,fd=5,port=null:", "--queue-pairs", "3")
    assert config.devices == (
        DeviceConfig("net0", socket_path="/a", port=parse_port("tap:a,ip=10.0.0.1/24"), queue_pairs=2,
                     features=FeatureEdit(0, mask(Feature.MQ, Feature.CSUM))),
        DeviceConfig("second", fd=5, port=NullSpec(), queue_pairs=3))


def test_comma_in_a_path():
    assert configure("--device", "socket=/a,,b").devices[0].socket_path == "/a,b"
    assert configure("--socket-path", "/a,b").devices[0].socket_path == "/a,b"


def test_client_for_all_does_not_concern_an_inherited_socket():
    first, second = configure("--client", "--device", "socket=/a", "--device", "fd=3").devices
    assert first.client
    assert not second.client


def test_socket_passed_by_the_service_manager():
    assert configure(passed=[3]).devices == (DeviceConfig("net0", fd=3),)
    config = configure("--device", "port=null:", "--device", "socket=/a", "--device", "name=c", passed=[3, 4])
    assert [(device.fd, device.socket_path) for device in config.devices] == [(3, None), (None, "/a"), (4, None)]


# ------------------------------------------------------------------------------------------ file


def test_file(file):
    path = file("""
        log-format = "json"
        one-off = true
        workers = 3
        cpus = [2]
        poll-us = "always"
        queue-pairs = 2
        socket-mode = 0o600
        [[device]]
        socket = "/run/a.sock"
        port = "tap:a,bridge=br0"
        features = ["-mrg_rxbuf", "+csum"]
        [[device]]
        name = "b"
        fd = 4
        features = "-mq"
        queue-pairs = 1
        """)
    assert configure("--config", path) == DaemonConfig(
        devices=(DeviceConfig("net0", socket_path="/run/a.sock", socket_mode=0o600, queue_pairs=2,
                              port=TapSpec("a", bridge="br0"),
                              features=FeatureEdit(mask(Feature.CSUM), mask(Feature.MRG_RXBUF))),
                 DeviceConfig("b", fd=4, socket_mode=0o600, queue_pairs=1,
                              features=FeatureEdit(0, mask(Feature.MQ)))),
        one_off=True, log_format="json", workers=3, cpus=(2,), poll_us=None)


def test_command_line_wins_over_the_file(file):
    path = file('log-format = "json"\nlog-level = "error"\nqueue-pairs = 2')
    config = configure("--config", path, "--log-format", "text", "--queue-pairs", "5", "--fd", "3")
    assert (config.log_format, config.log_level, config.devices[0].queue_pairs) == ("text", "error", 5)


def test_device_option_adds_to_those_of_the_file(file):
    path = file('[[device]]\nsocket = "/a"')
    assert [device.name for device in configure("--config", path, "--device", "socket=/b").devices] == [
        "net0", "net1"]


def test_shared_option_on_the_command_line_reaches_devices_of_the_file(file):
    path = file('[[device]]\nsocket = "/a"\n[[device]]\nsocket = "/b"\nqueue-pairs = 1')
    assert [d.queue_pairs for d in configure("--config", path, "--queue-pairs", "4").devices] == [4, 1]


def test_all_mistakes_are_listed_with_their_place(file):
    path = file("""
        log-format = "yaml"
        nonsense = 1
        [[device]]
        socket = "/a"
        queue-pairs = 0
        prot = "tap:x"
        features = ["mrg_rxbuf"]
        [[device]]
        socket = ""
        fd = "three"
        port = "tap:x,mtu=9"
        client = 1
        """)
    found = mistakes("--config", path, "--ready-fd", "x")
    place = f"{path}: "
    assert found == [
        f"{place}log-format yaml: must be one of text, json",
        f"{place}nonsense: unknown key; known: one-off, sandbox, log-format, log-level, upgrade-path, workers, "
        "cpus, poll-us, uplink, client, socket-group, socket-mode, queue-pairs, features, personality, speed, "
        "postcopy, lint",
        "--ready-fd x: must be a number from 0 to 1048575",
        f"{place}device 1: queue-pairs 0: must be a number from 1 to {QUEUE_PAIRS_MAX}",
        f"{place}device 1: prot: unknown key; known: name, socket, fd, client, socket-group, socket-mode, port, "
        "queue-pairs, features, personality, mac, speed, postcopy, lint",
        f"{place}device 1: features ['mrg_rxbuf']: 'mrg_rxbuf' needs a sign: +mrg_rxbuf to offer it, -mrg_rxbuf "
        "not to",
        f"{place}device 2: two sockets, of which only one can be: give socket=PATH or fd=N",
        f"{place}device 2: socket : must be a text that is not empty",
        f"{place}device 2: fd three: must be a number from 0 to 1048575",
        f"{place}device 2: --port tap:x,mtu=9: unknown option mtu=; known: ip=, bridge=",
        f"{place}device 2: client 1: must be on or off (true or false in a file)",
        f"{place}device 2: client means nothing with an inherited socket; leave it out",
    ]


def test_file_that_is_missing_or_no_toml(file, tmp_path):
    assert mistakes("--config", str(tmp_path / "none")) == [
        f"--config {tmp_path}/none: No such file or directory"]
    (line,) = mistakes("--config", file("one-off = \n"))
    assert "not valid TOML: " in line
    assert "line 1" in line
    (tmp_path / "vm.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in mistakes("--config", str(tmp_path / "vm.toml"))[0]
    assert mistakes("--config", str(tmp_path)) == [f"--config {tmp_path}: Is a directory"]


@pytest.mark.parametrize("text", ['device = "x"', '[device]\nsocket = "/a"', "device = [1]"])
def test_device_table_written_otherwise(file, text):
    path = file(text)
    assert f"{path}: device: write [[device]], with two brackets, above each device's keys" in mistakes(
        "--config", path, "--fd", "3")


# --------------------------------------------------------------------------------- wrong options


@pytest.mark.parametrize("arguments, line", [
    ([], "no socket: give --socket-path PATH or --fd N"),
    (["--socket-path", "/a", "--fd", "3"],
     "two sockets, of which only one can be: give --socket-path PATH or --fd N"),
    (["--fd", "x"], "--fd x: must be a number from 0 to 1048575"),
    (["--fd=-1"], "--fd -1: must be a number from 0 to 1048575"),
    (["--fd", "99999999999999999999"], "--fd 99999999999999999999: must be a number from 0 to 1048575"),
    (["--fd", "3", "--queue-pairs", "129"], "--queue-pairs 129: must be a number from 1 to 128"),
    (["--fd", "3", "--queue-pairs", "²"], "--queue-pairs ²: must be a number from 1 to 128"),
    (["--socket-path", ""], "--socket-path : must be a text that is not empty"),
    (["--socket-path", "/a", "--socket-mode", "rw"],
     "--socket-mode rw: must be permissions in octal, e.g. 0660 (0o660 in a file)"),
    (["--socket-path", "/a", "--socket-mode", "1777"],
     "--socket-mode 1777: must be permissions in octal, e.g. 0660 (0o660 in a file)"),
    (["--socket-path", "/a", "--client", "--socket-mode", "600"],
     "--socket-mode means nothing for a client, which makes no socket; leave it out"),
    (["--fd", "3", "--socket-group", "kvm"],
     "--socket-group means nothing with an inherited socket; leave it out"),
    (["--fd", "3", "--client"], "--client means nothing with an inherited socket; leave it out"),
    (["--fd", "3", "--log-level", "loud"], "--log-level loud: must be one of debug, info, warning, error"),
    (["--fd", "3", "--workers", "guest"], "--workers guest: must be device, pair, direction or a number from 1 to 64"),
    (["--fd", "3", "--workers", "0"], "--workers 0: must be device, pair, direction or a number from 1 to 64"),
    (["--fd", "3", "--cpus", "2,2"], "--cpus 2,2: must be numbers of processors, each once: 2,3 ([2, 3] in a file)"),
    (["--fd", "3", "--cpus", "2-3"], "--cpus 2-3: must be numbers of processors, each once: 2,3 ([2, 3] in a file)"),
    (["--fd", "3", "--poll-us", "ever"], "--poll-us ever: must be microseconds from 0 (off) to 1000000, or always"),
    (["--fd", "3", "--ready-fd", "3"], "descriptor 3 is given twice; each use needs one of its own"),
    (["--fd", "3", "--port", "tap:fd=3"], "descriptor 3 is given twice; each use needs one of its own"),
    (["--device", "socket=/a", "--device", "socket=/a"],
     "socket /a is given twice; each use needs one of its own"),
    (["--device", "socket=/a,name=x", "--device", "socket=/b,name=x"],
     "name x is given twice; each use needs one of its own"),
    (["--device", "socket=/a", "--port", "null:"],
     "--port describes a device of its own and does not go with --device or [[device]]; write it inside one"),
    (["--device", "socket=/a", "--socket-path", "/b"],
     "--socket-path describes a device of its own and does not go with --device or [[device]]; write it inside "
     "one"),
    (["--device", "socket=/a,socket=/b"], "--device socket=/a,socket=/b: socket= is given twice; give it once"),
    (["--device", "socket=/a,color=red"],
     "--device socket=/a,color=red: color: unknown key; known: name, socket, fd, client, socket-group, "
     "socket-mode, port, queue-pairs, features, personality, mac, speed, postcopy, lint"),
    (["--device", "port=null:"], "--device port=null:: no socket: give socket=PATH or fd=N"),
    (["--device", "socket=/a,client=maybe"],
     "--device socket=/a,client=maybe: client maybe: must be on or off (true or false in a file)"),
])
def test_mistake_is_one_line(arguments, line):
    assert mistakes(*arguments) == [line]


def test_wrong_port_lists_the_kinds():
    (line,) = mistakes("--fd", "3", "--port", "tpa:x")
    assert line.startswith("--port tpa:x: unknown kind of port 'tpa'; known: tap:NAME")


def test_path_longer_than_a_socket_address():
    path = "/" + "x" * PATH_MAX
    assert mistakes("--socket-path", path) == [
        f"--socket-path {path}: is longer than 107 bytes, the most a Unix socket's path may have"]


def test_null_in_a_text_of_the_file(file):
    path = file('[[device]]\nsocket = "/a\\u0000b"')
    assert any("must be a text that is not empty" in line for line in mistakes("--config", path))


def test_service_manager_passed_too_many_or_too_few():
    assert mistakes(passed=[3, 4]) == [
        "the service manager passed 1 sockets more than there are devices without one; add a --device port=... "
        "for each"]
    assert mistakes("--device", "port=null:", "--device", "name=b", passed=[3]) == [
        "--device name=b: no socket: give socket=PATH or fd=N"]


def test_unknown_option_and_abbreviation_are_one_line():
    for word in ("--frobnicate", "--socket-pa=/x"):
        assert mistakes(word) == [f"unrecognized arguments: {word}; `vdev --help` lists what there is"]
    assert mistakes("--fd") == ["argument --fd: expected one argument; `vdev --help` lists what there is"]
    assert mistakes("-v", "-q")[0].startswith("argument -q/--quiet: not allowed with argument -v/--verbose")


def test_address_goes_with_a_configuration_space_of_ours():
    (line,) = mistakes("--socket-path", "/a", "--mac", "52:54:00:00:00:01")
    assert "personality full" in line
    config = configure("--socket-path", "/a", "--mac", "52:54:00:00:00:01", "--personality", "full", "--speed", "2500")
    assert (config.devices[0].mac, config.devices[0].speed) == (bytes.fromhex("525400000001"), 2500)
    (line,) = mistakes("--socket-path", "/a", "--mac", "33:33:00:00:00:01", "--personality", "full")
    assert "no MAC address of one station" in line


def test_upgrade_does_not_go_with_a_configuration_space_of_ours():
    (line,) = mistakes("--socket-path", "/a", "--personality", "full", "--upgrade-path", "/b")
    assert "--upgrade-path does not go with personality full" in line
