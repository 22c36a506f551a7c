"""vdev/features_option.py: --features by name."""

import pytest

from vdev.features_option import FeatureEdit, parse_features
from vdev.net.features import Feature, mask
from vdev.net.offer import IMPLEMENTED


def test_names_in_either_case():
    assert parse_features(["+mrg_rxbuf", "-EVENT_IDX", "-guest_tso4"]) == FeatureEdit(
        add=mask(Feature.MRG_RXBUF), remove=mask(Feature.EVENT_IDX, Feature.GUEST_TSO4))


def test_nothing_to_change():
    assert parse_features([]) == FeatureEdit()


def test_bit_zero_is_a_feature_too():
    assert parse_features(["-csum"]).remove == mask(Feature.CSUM) == 1


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError) as caught:
        parse_features(["+mrg_rxbfu"])
    text = str(caught.value)
    assert text.startswith("unknown feature 'mrg_rxbfu'; known: csum, guest_csum, ")
    listed = text.partition("known: ")[2].split(", ")
    assert parse_features(["-" + name for name in listed]).remove | mask(
        Feature.VERSION_1, Feature.PROTOCOL_FEATURES) == IMPLEMENTED


@pytest.mark.parametrize("items, problem", [
    (["mrg_rxbuf"], r"'mrg_rxbuf' needs a sign: \+mrg_rxbuf to offer it, -mrg_rxbuf not to"),
    ([""], "needs a sign"),
    (["+"], "unknown feature ''"),
    (["+standby"], "standby is not implemented by this version"),
    (["+rsc_ext"], "rsc_ext is not implemented by this version"),
    (["+order_platform"], "order_platform is not implemented by this version"),
    (["-version_1"], "version_1 is always offered"),
    (["-protocol_features"], "protocol_features is always offered"),
    (["+csum", "-csum"], "csum is both added and removed"),
])
def test_wrong_items(items, problem):
    with pytest.raises(ValueError, match=problem):
        parse_features(items)


@pytest.mark.parametrize("name", ["packed", "ring_packed"])
def test_packed_rings_by_either_name(name):
    assert parse_features([f"-{name}"]).remove == parse_features([f"+{name}"]).add == mask(Feature.RING_PACKED)


def test_taking_out_what_is_never_there_is_fine():
    assert parse_features(["-rss"]).remove == mask(Feature.RSS)
