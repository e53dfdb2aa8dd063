"""Cache buffers: their layout is the operator's, growing keeps their content, and sliding ones stay small."""

import weakref

import numpy as np
import pytest

from slm.core.contract import CACHE_SLACK, CacheLayer, Side
from slm.core.manifest import Bundle
from slm.runtime.cache import FIRST_CAPACITY, KVBuffers, resident_positions
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.memory import HostBuffer

WINDOW = 16
SLIDING_LAYER = CacheLayer(layer=0, kv_heads=1, head_dim=4, window=WINDOW)
GLOBAL_LAYER = CacheLayer(layer=1, kv_heads=1, head_dim=4, window=None)


def memory(buffers: KVBuffers, layer: int, side: Side) -> np.ndarray:
    """Returns the array of a buffer on the CPU."""
    buffer = buffers._buffers[layer, side]
    assert isinstance(buffer, HostBuffer)
    return buffer.array


def test_resident_positions_follow_the_operators_rule() -> None:
    """Against a simulation: append one position; when the buffer is full, drop all but the window first."""
    capacity = WINDOW + CACHE_SLACK
    resident = 0
    for length in range(1, 200):
        resident = WINDOW if resident == capacity else resident + 1
        assert resident_positions(SLIDING_LAYER, length) == resident, length
        assert resident_positions(GLOBAL_LAYER, length) == length


def test_global_buffers_grow_and_keep_what_they_hold() -> None:
    buffers = KVBuffers([SLIDING_LAYER, GLOBAL_LAYER], context=1000)
    small = buffers.bytes
    held = memory(buffers, 1, "key")
    assert held.shape == (1, 1, FIRST_CAPACITY, 4)
    held[:] = np.arange(held.size).reshape(held.shape)
    buffers.reserve(FIRST_CAPACITY + 1)
    grown = memory(buffers, 1, "key")
    assert grown.shape[2] == 2 * FIRST_CAPACITY
    np.testing.assert_array_equal(grown[:, :, :FIRST_CAPACITY], held)
    assert buffers._buffers[0, "key"].shape[2] == WINDOW + CACHE_SLACK
    assert buffers.bytes > small
    buffers.reserve(1000)
    assert buffers._buffers[1, "key"].shape[2] == 1000


@pytest.mark.parametrize("prompt", [1, 1000, 30_000])
def test_buffers_are_never_much_longer_than_the_text(prompt: int) -> None:
    """Up to 32,768 positions, buffers are at most a quarter too long, and replaced so rarely that it costs little."""
    buffers = KVBuffers([SLIDING_LAYER, GLOBAL_LAYER], context=32_768)
    copied = 0
    for length in range(prompt, 32_769):
        before = buffers._buffers[1, "key"].shape[2]
        buffers.reserve(length)
        capacity = buffers._buffers[1, "key"].shape[2]
        assert length <= capacity <= max(FIRST_CAPACITY, 1.25 * length + FIRST_CAPACITY)
        copied += before if capacity != before else 0
    assert capacity == 32_768
    assert copied < 5 * capacity  # a geometric series: 1 / (1 - 1 / 1.25)


def test_growing_copies_the_rows_in_use() -> None:
    buffers = KVBuffers([GLOBAL_LAYER], context=1000, batch=3)
    memory(buffers, 1, "key")[:] = 1
    buffers.reserve(500, rows=2)
    assert memory(buffers, 1, "key")[:, 0, 0, 0].tolist() == [1, 1, 0]


def test_what_was_replaced_is_freed_while_growing(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding keeps its buffers alive: if the last one were kept, old and new buffers would be in memory together."""
    monkeypatch.setattr("slm.runtime.cache.FIRST_CAPACITY", 8)
    decoder = OnnxDecoder(shared_bundle)
    decoder.read([1, 2, 3])
    assert isinstance(decoder.buffers, KVBuffers)
    old = [weakref.ref(memory(decoder.buffers, *key)) for key in decoder.buffers._buffers]
    decoder.make_room(decoder.buffers, 8)
    assert all(array() is not None for array in old)  # there was room
    decoder.make_room(decoder.buffers, 9)
    assert sum(array() is None for array in old) == 2  # keys and values of the global layer


def test_rows_share_memory() -> None:
    buffers = KVBuffers([GLOBAL_LAYER], context=64, batch=2)
    memory(buffers.row(1), 1, "value")[:] = 7
    assert (memory(buffers, 1, "value")[1] == 7).all() and (memory(buffers, 1, "value")[0] == 0).all()


def test_growing_in_the_middle_changes_nothing(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(3).integers(0, shared_bundle.config.vocab_size, (1, 60))
    whole = OnnxDecoder(shared_bundle).step(ids)
    monkeypatch.setattr("slm.runtime.cache.FIRST_CAPACITY", 8)
    decoder = OnnxDecoder(shared_bundle)
    for token in ids.T:
        last = decoder.step(token[None])
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_reset_forgets(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle)
    first = decoder.read([1, 2, 3])
    decoder.read([4])
    decoder.reset()
    assert decoder.length == 0
    np.testing.assert_array_equal(decoder.read([1, 2, 3]), first)


def test_long_prompts_are_read_in_chunks(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(4).integers(0, shared_bundle.config.vocab_size, 100).tolist()
    at_once = OnnxDecoder(shared_bundle).read(ids)
    monkeypatch.setattr("slm.runtime.decoder.PREFILL_CHUNK", 17)
    np.testing.assert_allclose(OnnxDecoder(shared_bundle).read(ids), at_once, atol=1e-4)
