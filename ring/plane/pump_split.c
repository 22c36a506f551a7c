/* The fd pump for split rings: both directions with the ring's micro-steps inlined. */
#include "../core/split.inl"

#define RING(verb) split_##verb
#include "from_guest.inl"
#include "to_guest.inl"
#include "forward.inl"
#include "deliver.inl"

const struct directions split_directions = {from_guest, to_guest, look, gather, deliver, settle, take_back,
                                            tell_from_guest, tell_to_guest};
