/* The fd pump for packed rings: both directions with the ring's micro-steps inlined. */
#include "../core/packed.inl"

#define RING(verb) packed_##verb
#include "from_guest.inl"
#include "to_guest.inl"
#include "forward.inl"
#include "deliver.inl"

const struct directions packed_directions = {from_guest, to_guest, look, gather, deliver, settle, take_back,
                                             tell_from_guest, tell_to_guest};
