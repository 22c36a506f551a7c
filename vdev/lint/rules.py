"""The rules that a driver and its front-end can be held to from the device's side.

A rule has the id of its row in the tables of requirements; ids that begin with LINT are rules that no row there has.
Sections without a name are those of virtio 1.2, names those of the vhost-user specification.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """level: as in the specification (MUST, MUST NOT, SHOULD, SHOULD NOT). hint: what is probably wrong, and where to
    look."""

    id: str
    level: str
    section: str
    requirement: str
    hint: str

    @property
    def binding(self) -> bool:
        """A driver that breaks it does not conform (MUST, MUST NOT)."""
        return self.level.startswith("MUST")


_RULES = (
    # ------------------------------------------------------------------------- negotiation and status
    Rule("FEAT-DR-01", "MUST NOT", "2.2.1", "accept a feature that was not offered",
         "mask the driver's features with what the device offers"),
    Rule("FEAT-DR-02", "MUST NOT", "2.2.1", "accept a feature without one that it requires",
         "section 5.1.3.1 lists what each feature requires; leave both out or take both"),
    Rule("RSVF-DR-01", "MUST", "6.1", "accept VERSION_1 when it is offered",
         "the driver uses the legacy interface; give the guest a modern device (QEMU: disable-legacy=on)"),
    Rule("ST-DR-02", "MUST NOT", "2.1.1", "clear a bit of the device status other than by a reset",
         "read the status, add the bit, write it back; write 0 to reset"),
    Rule("ST-DR-03", "MUST", "2.1.1", "reset the device after FAILED before initialising it again",
         "write 0 to the status first"),
    Rule("INIT-DR-01", "MUST", "3.1.1", "set FEATURES_OK after the features and before DRIVER_OK",
         "follow the order: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, queues, DRIVER_OK"),
    Rule("INIT-DR-03", "MUST NOT", "3.1.1", "accept new features after FEATURES_OK",
         "reset the device to negotiate again"),
    Rule("NET-CFG-DR-01", "MUST NOT", "5.1.4", "write to the device's configuration",
         "with VERSION_1 the address is set through the control queue"),

    # --------------------------------------------------------------------------------- the front-end
    Rule("VU-REPLY-F-01", "MUST NOT", "VHOST_USER_PROTOCOL_F_REPLY_ACK", "set need_reply before REPLY_ACK is agreed on",
         "the front-end must wait until SET_PROTOCOL_FEATURES has been sent"),
    Rule("VU-RING-F-02", "SHOULD", "VHOST_USER_SET_VRING_ENABLE", "send SET_VRING_ENABLE only with bit 30 negotiated",
         "set bit 30 in SET_FEATURES, or leave the message out"),
    Rule("VU-BASE-F-01", "MUST", "VHOST_USER_GET_VRING_BASE", "send 0 in the num field of GET_VRING_BASE",
         "clear the structure before it is sent"),
    Rule("VU-MQ-F-01", "SHOULD", "Multiple queue support", "stay within the rings that the back-end has",
         "ask GET_QUEUE_NUM, and give vdev --queue-pairs"),
    Rule("VU-MEM-F-01", "MUST NOT", "Memory region description", "share memory regions that overlap",
         "remove a region before another takes its place"),
    Rule("VU-MEM-F-03", "MUST", "VHOST_USER_ADD_MEM_REG",
         "send one descriptor with ADD_MEM_REG, and memory slots only with CONFIGURE_MEM_SLOTS",
         "negotiate CONFIGURE_MEM_SLOTS, and attach the file of the region"),
    Rule("VU-LOG-F-01", "MUST", "Migration", "share a log that covers the used ring's last byte",
         "size the log by the highest address of guest memory"),

    # ------------------------------------------------------------------------------------ split rings
    Rule("VQ-SPLIT-DR-01", "MUST", "2.7.1", "align descriptor table, available and used ring to 16, 2 and 4 bytes",
         "allocate each part aligned"),
    Rule("VQ-SPLIT-DR-02", "MUST", "2.7", "use a queue size that is a power of two, at most 32768",
         "round the size down to a power of two"),
    Rule("VQ-SPLIT-DR-03", "MUST", "2.7.4.2", "place device-writable descriptors behind the device-readable ones",
         "add the readable buffers of a chain first"),
    Rule("VQ-SPLIT-DR-05", "MUST NOT", "2.7.5.2", "make a chain that loops or is longer than 4 GiB",
         "look whether a free list hands out a descriptor twice"),
    Rule("VQ-SPLIT-DR-06", "MUST", "2.7.5.2", "with IN_ORDER, link each descriptor to the one behind it in the table",
         "IN_ORDER is for a driver that uses its table as a ring; do not negotiate it otherwise"),
    Rule("VQ-SPLIT-DR-07", "MUST NOT", "2.7.5.3.1", "use INDIRECT without INDIRECT_DESC",
         "negotiate INDIRECT_DESC, or chain with NEXT"),
    Rule("VQ-SPLIT-DR-08", "MUST NOT", "2.7.5.3.1", "use INDIRECT inside an indirect table", "use one table only"),
    Rule("VQ-SPLIT-DR-09", "MUST NOT", "2.7.5.3.1", "make a chain of more descriptors than the queue has",
         "split the request, or merge its buffers"),
    Rule("VQ-SPLIT-DR-10", "MUST NOT", "2.7.5.3.1", "set INDIRECT and NEXT in one descriptor",
         "clear NEXT: the table ends the chain"),
    Rule("VQ-SPLIT-DR-11", "MUST NOT", "2.7.6.1", "move the available index back",
         "it only counts up, modulo 65536; a leap beyond the queue size looks the same"),
    Rule("VQ-SPLIT-DR-12", "MUST", "2.7.7.1", "write 0 or 1 into flags of the available ring, with EVENT_IDX 0",
         "with EVENT_IDX say it by used_event"),
    Rule("VQ-SPLIT-DR-17", "MUST", "2.7.10.1", "kick after publishing when flags of the used ring is 0",
         "a full barrier belongs between writing the available index and reading the flag"),
    Rule("VQ-SPLIT-DR-18", "MUST", "2.7.10.1", "with EVENT_IDX, kick when the entry that avail_event names is filled",
         "a full barrier belongs between writing the available index and reading avail_event"),
    Rule("CLEAN-DR-01", "MUST NOT", "3.3.1", "change or reuse a descriptor that the device still owns",
         "take a descriptor back only when it came out of the used ring"),

    # ----------------------------------------------------------------------------------- packed rings
    Rule("VQ-PACKED-DR-01", "MUST", "2.8.10.1", "align descriptor ring and event suppression to 16, 4 and 4 bytes",
         "allocate each part aligned"),
    Rule("VQ-PACKED-DR-02", "MUST", "2.8.1", "set AVAIL to the wrap counter and USED to its inverse in all of a chain",
         "each descriptor of a chain has them, with the counter of its own slot"),
    Rule("VQ-PACKED-DR-03", "MUST NOT", "2.8.16", "change a descriptor before the device has used it",
         "take a descriptor back only when its USED flag changed"),
    Rule("VQ-PACKED-DR-05", "MUST NOT", "2.8.17", "make a chain longer than the queue, or one without an end",
         "clear NEXT in the last descriptor"),
    Rule("VQ-PACKED-DR-06", "MUST", "2.8.17", "place device-writable descriptors behind the device-readable ones",
         "add the readable buffers of a chain first"),
    Rule("VQ-PACKED-DR-09", "MUST NOT", "2.8.19",
         "use INDIRECT without INDIRECT_DESC, or a flag but WRITE inside a table",
         "entries of a packed ring's table follow each other: no NEXT, no INDIRECT"),
    Rule("VQ-PACKED-DR-10", "MUST NOT", "2.8.19", "use INDIRECT in a chain of several descriptors",
         "a packed ring's chain is linked by NEXT or is one table"),
    Rule("LINT-EVENT", "MUST", "2.8.14", "leave reserved bits and values of the driver's event suppression at 0",
         "flags is 0 (enable), 1 (disable) or, with EVENT_IDX, 2 (a slot of the ring)"),
    Rule("LINT-KICK", "MUST", "2.8.21", "on a packed ring, kick when the device's event suppression asks for it",
         "a full barrier belongs between writing the flags and reading the device's event suppression"),

    # --------------------------------------------------------------------------------- either format
    Rule("LINT-HEAD", "MUST", "2.7.6", "name a descriptor of the table in the available ring",
         "the entry is the index of a chain's first descriptor"),
    Rule("LINT-NEXT", "MUST", "2.7.5", "link a descriptor to one of its own table",
         "next is an index, not an address; is NEXT set where the chain ends?"),
    Rule("LINT-TABLE", "MUST", "2.7.5.3", "give an indirect table a length that is a multiple of 16, and not 0",
         "len of the descriptor is that of the table in bytes"),
    Rule("LINT-ADDRESS", "MUST", "6.1", "give the device addresses of guest memory only",
         "physical addresses are due, of memory that is shared with the back-end (share=on)"),
    Rule("LINT-PIECES", "SHOULD NOT", "2.7.4.2", "cut a buffer into an excessive number of descriptors",
         "merge what lies side by side; more than 1023 pieces are refused here"),

    # --------------------------------------------------------------------------- frames of the driver
    Rule("LINT-TRANSMIT", "MUST", "5.1.6.2", "send a frame as a header of 12 bytes and the frame, device-readable",
         "the header has num_buffers with VERSION_1, whatever else was negotiated"),
    Rule("NET-CFG-DR-06", "MUST NOT", "5.1.4.1", "send a frame longer than the MTU, unless it is to be segmented",
         "the interface's MTU must not exceed the device's"),
    Rule("NET-MQ-DR-03", "MUST", "5.1.6.5.6", "send only on the queues that are enabled",
         "VQ_PAIRS_SET comes first; before it there is pair 0 only"),
    Rule("NET-TX-DR-02", "MUST", "5.1.6.2.1", "set num_buffers to 0 in a frame that is sent", "clear the header first"),
    Rule("NET-TX-DR-03", "MUST", "5.1.6.2.1", "set flags to 0 where CSUM was not negotiated",
         "compute the checksum in the driver"),
    Rule("NET-TX-DR-05", "MUST NOT", "5.1.6.2.1", "use a gso_type whose HOST_ feature was not negotiated",
         "segment in the driver's network stack"),
    Rule("NET-TX-DR-06", "MUST", "5.1.6.2.1", "set gso_type to NONE where no HOST_ segmentation was negotiated",
         "segment in the driver's network stack"),
    Rule("NET-TX-DR-07", "SHOULD NOT", "5.1.6.2.1", "send TCP with CWR to be segmented where HOST_ECN is missing",
         "segment such packets in the driver's network stack"),
    Rule("NET-TX-DR-08", "MUST", "5.1.6.2.1", "with HOST_ECN, set GSO_ECN for TCP with CWR that is to be segmented",
         "add 0x80 to gso_type"),
    Rule("NET-TX-DR-10", "MUST", "5.1.6.2.1", "with NEEDS_CSUM, put the pseudo-header's sum into the checksum field",
         "neither 0 nor a complete checksum is right there"),
    Rule("NET-TX-DR-11", "MUST", "5.1.6.2.1", "with NEEDS_CSUM, let csum_start and csum_offset name a field",
         "csum_start counts from the Ethernet header, csum_offset from csum_start"),
    Rule("NET-TX-DR-12", "MUST", "5.1.6.2.1", "send what is to be segmented with NEEDS_CSUM and a gso_size",
         "gso_size is the MSS, without headers"),
    Rule("NET-TX-DR-13", "MUST", "5.1.6.2.1", "with GUEST_HDRLEN, set hdr_len to the exact length of the headers",
         "up to and with the transport header"),
    Rule("NET-TX-DR-14", "SHOULD", "5.1.6.2.1", "set hdr_len to no less than all headers of what is to be segmented",
         "up to and with the transport header"),
    Rule("NET-TX-DR-15", "MUST NOT", "5.1.6.2.1", "set DATA_VALID or RSC_INFO in a frame that is sent",
         "they are for received frames; clear the header first"),

    # ------------------------------------------------------------- commands, where the queue is ours
    Rule("LINT-COMMAND", "MUST", "5.1.6.5", "send only commands that there are, with the features they need",
         "a command is its class, its number and its data"),
    Rule("NET-RXF-DR-01", "MUST NOT", "5.1.6.5.1", "send PROMISC or ALLMULTI without CTRL_RX",
         "look at the features before the command is sent"),
    Rule("NET-RXF-DR-02", "MUST NOT", "5.1.6.5.1", "send ALLUNI, NOMULTI, NOUNI or NOBCAST without CTRL_RX_EXTRA",
         "look at the features before the command is sent"),
    Rule("NET-MAC-DR-01", "MUST NOT", "5.1.6.5.2",
         "send MAC_TABLE_SET without CTRL_RX, or MAC_ADDR_SET without CTRL_MAC_ADDR",
         "look at the features before the command is sent"),
    Rule("NET-MAC-DR-03", "MUST", "5.1.6.5.2", "list single stations in the first table, groups in the second",
         "bit 0 of an address's first byte tells them apart"),
    Rule("NET-MQ-DR-02", "MUST NOT", "5.1.6.5.6", "ask for 0 queue pairs, or more than max_virtqueue_pairs",
         "read max_virtqueue_pairs from the configuration space"),
    Rule("NET-RSS-DR-01", "MUST NOT", "5.1.6.5.7", "send RSS_CONFIG without RSS",
         "look at the features before the command is sent"),
    Rule("NET-OFL-DR-01", "MUST NOT", "5.1.6.5.8", "enable an offload whose feature was not negotiated",
         "mask the offloads with the features"),
    Rule("NET-COAL-DR-01", "MUST", "5.1.6.5.9",
         "send coalescing commands only with their feature, and about queues that are enabled",
         "TX_SET and RX_SET need NOTF_COAL, VQ_SET and VQ_GET need VQ_NOTF_COAL"),
    Rule("NET-HASH-DR-01", "MUST", "virtio 1.3, \"Inner Header Hash\"", "send HASH_TUNNEL_SET only with HASH_TUNNEL",
         "look at the features before the command is sent"),

    # ------------------------------------------------------------------------------- receive buffers
    Rule("LINT-RECEIVE", "MUST", "5.1.6.3", "give the receiveq buffers that are device-writable only",
         "set WRITE in each descriptor"),
    Rule("NET-RXB-DR-01", "SHOULD", "5.1.6.3.1",
         "with GUEST segmentation and without MRG_RXBUF, post buffers of 65562 bytes at least",
         "longer frames are lost; negotiate MRG_RXBUF, or no GUEST_TSO"),
    Rule("NET-RXB-DR-02", "SHOULD", "5.1.6.3.1", "without MRG_RXBUF, post buffers of 1526 bytes at least",
         "1514 for the frame and 12 for the header"),
    Rule("NET-RXB-DR-03", "MUST", "5.1.6.3.1", "with MRG_RXBUF, post buffers that hold the header at least",
         "12 bytes"),
)

RULES = {rule.id: rule for rule in _RULES}
