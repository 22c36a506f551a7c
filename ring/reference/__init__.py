"""The device's side of both virtqueue formats in plain Python, to be read beside the specification.

    split.py    virtio 1.2, 2.7 "Split Virtqueues"
    packed.py   virtio 1.2, 2.8 "Packed Virtqueues"
    queue.py    what a queue is in either format; pop, the walk from one end of a chain to the other
    chain.py    one chain: the buffers it describes, and what may be wrong with them
    memory.py   guest memory, and where an address lies in it
    rules.py    every rule a driver can break, with its section; why a driver is notified
    show.py     a ring as text

docs/rings.md follows one frame through both formats. Read split.py first, in which steps come in the order of
events, then what differs in packed.py. Constants have the specification's names, less their prefix VIRTQ_ or
VIRTIO_F_; addresses are guest-physical (gpa) unless they are called uva.

A queue is used exactly as ring.virtqueue.VirtQueue is, and gives the same answers: tests/test_ring_agreement.py
drives both with the same drivers, honest and lying, and compares every answer and every byte. That is what this
package is for: to be understood, and to be right.

It is no engine. It knows no barriers, so the driver has to stand still while it works; it knows nothing of
guest memory that vanishes; and it is slow. No daemon serves a guest with it.
"""

from ring.reference.chain import Chain
from ring.reference.packed import PackedQueue
from ring.reference.queue import Queue, QueueState
from ring.reference.rules import CallReason, ChainError, RingBroken, Rule, RuleBroken, SetupError
from ring.reference.split import SplitQueue

__all__ = ["CallReason", "Chain", "ChainError", "PackedQueue", "Queue", "QueueState", "RingBroken", "Rule",
           "RuleBroken", "SetupError", "SplitQueue"]
