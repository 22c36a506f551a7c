"""Network namespaces: vdev/testing/netns.py."""

import subprocess

import pytest

from vdev.testing.netns import Namespace, NamespaceError


@pytest.fixture
def namespace():
    try:
        with Namespace() as made:
            yield made
    except NamespaceError as reason:
        pytest.skip(str(reason))


def _links(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()]


def test_it_is_empty_but_for_a_loopback_that_is_up(namespace: Namespace) -> None:
    links = namespace.run(["ip", "-br", "link"]).stdout
    assert _links(links) == ["lo"]
    assert "LOOPBACK,UP" in links


def test_links_made_inside_are_not_seen_outside(namespace: Namespace) -> None:
    namespace.run(["ip", "link", "add", "vdev-inside", "type", "bridge"])
    assert "vdev-inside" in _links(namespace.run(["ip", "-br", "link"]).stdout)
    outside = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "vdev-inside" not in _links(outside)


def test_a_failed_command_is_told_in_its_own_words(namespace: Namespace) -> None:
    with pytest.raises(NamespaceError, match=r'ip link show dev nowhere: Device "nowhere" does not exist'):
        namespace.run(["ip", "link", "show", "dev", "nowhere"])
    assert namespace.run(["false"], check=False).returncode == 1


def test_commands_are_bounded(namespace: Namespace) -> None:
    with pytest.raises(NamespaceError, match="sleep 60: no end within 0.05 s"):
        namespace.run(["sleep", "60"], timeout=0.05)


def test_closing_twice_is_closing_once() -> None:
    try:
        namespace = Namespace()
    except NamespaceError as reason:
        pytest.skip(str(reason))
    namespace.close()
    namespace.close()
    with pytest.raises(NamespaceError):
        namespace.run(["true"])
