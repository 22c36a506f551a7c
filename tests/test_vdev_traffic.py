"""vdev/traffic.py: what went through a session."""

from types import SimpleNamespace

from vdev.traffic import between, effort, sentence


def reading(frames: int, **dropped: int) -> SimpleNamespace:
    return SimpleNamespace(frames=frames, bytes=100 * frames, gso_frames=frames // 2, kicks=3, calls=4,
                           cycles=700 * frames, bursts=frames // 5, dropped=dropped)


def test_counts_are_those_since_the_first_reading():
    before = reading(10, no_port=5, bad_header=1), reading(0)
    after = reading(12, no_port=5, bad_header=3, bad_chain=4), reading(7)
    counts = between(before, after)
    assert counts == {
        "from_guest": {"frames": 2, "bytes": 200, "gso_frames": 1, "kicks": 0, "calls": 0,
                       "dropped": {"bad_header": 2, "bad_chain": 4}},
        "to_guest": {"frames": 7, "bytes": 700, "gso_frames": 3, "kicks": 0, "calls": 0, "dropped": {}},
    }
    assert sentence(counts) == ("from guest 2 frames, 200 bytes, 6 dropped (bad_header 2, bad_chain 4); "
                                "to guest 7 frames, 700 bytes, none dropped")
    assert effort(before, after) == {"cycles": {"from_guest": 1400, "to_guest": 4900},
                                     "bursts": {"from_guest": 0, "to_guest": 1}}
