"""Logits of single-token steps are in memory that slm uses again, but never while a caller refers to it."""

import numpy as np

from slm.core.manifest import Bundle
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder

IDS = np.random.default_rng(2).integers(0, 320, 20).tolist()


def test_logits_that_a_caller_keeps_do_not_change(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle, threads=1)
    decoder.read(IDS[:5])
    kept = [decoder.read([token]) for token in IDS[5:]]
    copies = [array.copy() for array in kept]
    for token in IDS:
        decoder.read([token])
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    again = OnnxDecoder(shared_bundle, threads=1)
    again.read(IDS[:5])
    for token, array in zip(IDS[5:], kept, strict=True):
        np.testing.assert_array_equal(again.read([token]), array)


def test_memory_is_used_again_once_nobody_refers_to_it(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle, threads=1)
    places = set()
    for token in IDS:
        logits = decoder.read([token])
        places.add(logits.ctypes.data)
    assert len(places) <= 2  # the caller holds the last logits until it has the next ones


def test_steps_of_every_kind_take_turns(shared_bundle: Bundle) -> None:
    """Single tokens, several tokens, all positions and other numbers of rows each get their own tokens and logits."""
    mixed, plain = OnnxDecoder(shared_bundle, threads=1), OnnxDecoder(shared_bundle, threads=1)
    found = [mixed.read(IDS[:1]), mixed.read(IDS[1:4]), mixed.read(IDS[4:5]), mixed.read_each(IDS[5:7])[-1],
             mixed.read(IDS[7:8])]  # fmt: skip
    expected = {count: plain.read(IDS[count - 1 : count]).copy() for count in range(1, 9)}
    for count, logits in zip((1, 4, 5, 7, 8), found, strict=True):
        np.testing.assert_allclose(logits, expected[count], atol=1e-4)


def test_rows_of_a_batch(shared_bundle: Bundle) -> None:
    batch = Batch(OnnxDecoder(shared_bundle, threads=1), 3)
    slots = [batch.take() for _ in range(3)]
    first = batch.step({slot: IDS[index] for index, slot in enumerate(slots)})
    kept = {slot: logits.copy() for slot, logits in first.items()}
    batch.step({slots[0]: IDS[3]})
    batch.step({slot: IDS[4] for slot in slots})
    for slot, logits in first.items():
        np.testing.assert_array_equal(logits, kept[slot])
    alone = OnnxDecoder(shared_bundle, threads=1)
    for index, slot in enumerate(slots):
        alone.reset()
        np.testing.assert_array_equal(alone.read([IDS[index]]), first[slot])
