"""Rewinding and snapshots: exact if allowed, and rejected with a reason if positions are lost."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slm
from slm.core.contract import CACHE_SLACK
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM
from slm.core.nn.decoder import TorchDecoder
from slm.runtime.backend import Decoder
from slm.runtime.cache import KVBuffers, resident_positions
from slm.runtime.decoder import OnnxDecoder

WINDOW = 16
CAPACITY = WINDOW + CACHE_SLACK
IDS = np.random.default_rng(5).integers(0, 320, 200).tolist()

# The same tokens read in other portions, or over a buffer that moved up elsewhere: sums of floats in another order,
# measured 3e-6 on logits of standard deviation 0.4.
TOLERANCE = 2e-5
# Rounding to INT8, of activations and of caches, makes much of a float's last bit: what was read in other portions differs
# by as much as quantization changes.
INT8_TOLERANCE = 0.5


@pytest.fixture(scope="module")
def pools() -> dict[str, list[Decoder]]:
    """Decoders that the tests of the module share, by their kind: to open a bundle takes longer than most of the tests."""
    return defaultdict(list)


@pytest.fixture(params=["fused", "int8", "torch", "portable"])
def make(
    request: pytest.FixtureRequest, shared_checkpoint: Path, pools: dict[str, list[Decoder]]
) -> Callable[[], Decoder]:
    """Makes decoders of one kind on the same model. Each is another one, and has read nothing."""
    kind, numbers = request.param, count()

    def new() -> Decoder:
        if kind == "torch":
            first = pools[kind][0] if pools[kind] else slm.load(shared_checkpoint).decoder
            assert isinstance(first, TorchDecoder)
            return TorchDecoder(first.model)
        fixture = {"fused": "shared_bundle", "int8": "int8_bundle", "portable": "portable_bundle"}[kind]
        return OnnxDecoder(request.getfixturevalue(fixture), threads=1)

    def make() -> Decoder:
        number = next(numbers)
        if number == len(pools[kind]):
            pools[kind].append(new())
        pools[kind][number].reset()
        return pools[kind][number]

    return make


def arrays(buffers: KVBuffers) -> dict[Any, np.ndarray]:
    """Returns the arrays of buffers on a CPU."""
    return {key: buffer.array for key, buffer in buffers._buffers.items()}  # type: ignore[attr-defined]


def stepwise(decoder: Decoder, ids: list[int]) -> np.ndarray:
    """Reads token by token and returns the last logits."""
    logits = np.empty(0)
    for token in ids:
        logits = decoder.read([token])
    return logits


def positions_held(decoder: Decoder, read: int) -> int:
    """Returns how many positions a sliding layer holds after single-token steps, simulated step by step."""
    if isinstance(decoder, TorchDecoder):
        return min(read, WINDOW - 1 + 16)
    if is_portable(decoder):
        return min(read, WINDOW - 1)
    held = 0
    for _ in range(read):
        held = WINDOW if held == CAPACITY else held + 1
    return held


def is_portable(decoder: Decoder) -> bool:
    return isinstance(decoder, OnnxDecoder) and decoder.bundle.manifest.target == "portable"


def is_int8(decoder: Decoder) -> bool:
    return isinstance(decoder, OnnxDecoder) and decoder.bundle.manifest.precision == "int8"


@pytest.mark.parametrize("read", [5, WINDOW, CAPACITY - 1, CAPACITY, CAPACITY + 1, CAPACITY + 9, 3 * CAPACITY + 4])
def test_going_back_is_exact_or_refused(make: Callable[[], Decoder], read: int) -> None:
    """Bit for bit: a text that was rewound equals one that never went further."""
    allowed = refused = 0
    decoder, fresh = make(), make()
    furthest = max(0, positions_held(decoder, read) - (WINDOW - 1))  # how far back the window is still complete
    for length in {0, 1, read // 2, *(max(0, read - back) for back in (0, 1, furthest, furthest + 1))}:
        decoder.reset()
        stepwise(decoder, IDS[:read])
        left = positions_held(decoder, read) - (read - length)
        if 0 < length < read and left < min(length, WINDOW - 1):
            with pytest.raises(SlmError, match=f"from {read} tokens to {length}: a sliding layer needs"):
                decoder.rewind(length)
            assert decoder.length == read  # the rejected call changed nothing
            refused += 1
            continue
        decoder.rewind(length)
        assert decoder.length == length
        fresh.reset()
        stepwise(fresh, IDS[:length])
        for token in (7, 9, *IDS[:CAPACITY]):  # another way on, until the buffers moved up again
            np.testing.assert_array_equal(decoder.read([token]), fresh.read([token]))
        allowed += 1
    assert allowed >= 2 and (refused or read <= CAPACITY)


def test_nobody_goes_back_to_what_was_never_read(make: Callable[[], Decoder]) -> None:
    decoder = make()
    decoder.read([1, 2, 3])
    for length in (4, -1):
        with pytest.raises(SlmError, match=f"cannot rewind to {length} tokens: only 3 were read"):
            decoder.rewind(length)


def test_without_moving_back_down_it_would_be_wrong(shared_bundle: Bundle) -> None:
    """Negative control: the buffers moved up in between, so the rest must move back to where the graph expects it."""
    lengths = CAPACITY + 6, CAPACITY
    wanted = OnnxDecoder(shared_bundle, threads=1)
    stepwise(wanted, IDS[: lengths[1]])
    expected = wanted.read([7])
    for moves in (True, False):
        decoder = OnnxDecoder(shared_bundle, threads=1)
        stepwise(decoder, IDS[: lengths[0]])
        assert isinstance(decoder.buffers, KVBuffers)
        before = {key: array.copy() for key, array in arrays(decoder.buffers).items()}
        decoder.rewind(lengths[1])
        if not moves:
            for key, array in before.items():
                arrays(decoder.buffers)[key][:] = array
        assert np.array_equal(decoder.read([7]), expected) == moves


def test_going_back_where_it_is_refused_would_be_wrong(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: positions that left the window are missed."""
    monkeypatch.setattr("slm.runtime.cache.check_rewind", lambda *_: None)
    decoder, fresh = OnnxDecoder(shared_bundle, threads=1), OnnxDecoder(shared_bundle, threads=1)
    stepwise(decoder, IDS[: CAPACITY + 1])
    decoder.rewind(CAPACITY - 8)
    stepwise(fresh, IDS[: CAPACITY - 8])
    assert np.abs(decoder.read([7]) - fresh.read([7])).max() > 100 * TOLERANCE


def test_a_random_walk(make: Callable[[], Decoder]) -> None:
    """Reads of any length and rewinds of any length: the result always equals a fresh read of the same tokens."""
    chance = np.random.default_rng(11)
    decoder, fresh = make(), make()
    kept: list[int] = []
    back = 0
    tolerance = INT8_TOLERANCE if is_int8(fresh) else TOLERANCE
    for _ in range(40):
        if kept and chance.random() < 0.4:
            length = max(0, len(kept) - int(chance.integers(0, 20)))
            try:
                decoder.rewind(length)
            except SlmError:
                continue
            back += 1
            kept = kept[:length]
        more = chance.integers(0, 320, chance.choice([1, 2, 5, 16, 40])).tolist()
        if len(kept) + len(more) > decoder.context:
            break
        kept += more
        logits = decoder.read(more)
        fresh.reset()
        np.testing.assert_allclose(logits, fresh.read(kept), atol=tolerance)
    assert back > (0 if is_portable(fresh) else 5) and decoder.length == len(kept)


def test_what_is_revocable_is(make: Callable[[], Decoder]) -> None:
    """After any reads, as many tokens as `revocable` states can be rewound."""
    decoder, fresh = make(), make()
    used = 0
    for position in range(1, 3 * CAPACITY):
        decoder.read([IDS[position]])
        count = min(decoder.revocable, 16)
        if count == 0 or position % 5:
            continue
        used += 1
        each = decoder.read_each(IDS[50 : 50 + count])
        assert each.shape == (count, 320) and decoder.length == position + count
        decoder.rewind(position)
        if position % 15 == 0:  # and the logits are those of the tokens one by one, but for rounding
            fresh.reset()
            stepwise(fresh, IDS[1 : position + 1])
            ones = np.array([fresh.read([token]) for token in IDS[50 : 50 + count]])
            np.testing.assert_allclose(each, ones, atol=INT8_TOLERANCE if is_int8(fresh) else TOLERANCE)
    fresh.reset()
    stepwise(fresh, IDS[1 : 3 * CAPACITY])
    np.testing.assert_array_equal(decoder.read([3]), fresh.read([3]))
    assert used >= 2


BOUNDARIES = [1, WINDOW - 1, WINDOW, WINDOW + 1, CAPACITY, CAPACITY + 1, CAPACITY + 7, 3 * CAPACITY]


@pytest.mark.parametrize("length", BOUNDARIES)
def test_a_snapshot_restores_exactly(make: Callable[[], Decoder], length: int) -> None:
    decoder = make()
    decoder.read(IDS[:length])
    snapshot = decoder.snapshot()
    assert snapshot.length == length and snapshot.bytes > 0
    wanted = [decoder.read([token]) for token in IDS[: CAPACITY + 2]]  # what was copied stays as it was
    others = [make(), decoder]
    others[0].read(IDS[50:])  # longer buffers, full of something else
    for other in others:
        for _ in range(2):
            other.restore(snapshot)
            assert other.length == length
            for token, logits in zip(IDS, wanted, strict=False):
                np.testing.assert_array_equal(other.read([token]), logits)


@pytest.mark.parametrize("length", BOUNDARIES)
def test_a_restored_text_goes_back_by_a_token(make: Callable[[], Decoder], length: int) -> None:
    """Reading the last token of a known prompt again returns the same logits."""
    decoder, fresh = make(), make()
    stepwise(decoder, IDS[:length])
    snapshot = decoder.snapshot()
    decoder.reset()
    decoder.restore(snapshot)
    if is_portable(decoder) and length >= WINDOW:
        with pytest.raises(SlmError, match="its cache starts at position"):
            decoder.rewind(length - 1)
        return
    decoder.rewind(length - 1)
    np.testing.assert_array_equal(decoder.read([IDS[length - 1]]), stepwise(fresh, IDS[:length]))


def test_a_snapshot_takes_what_is_resident(shared_bundle: Bundle) -> None:
    decoder = OnnxDecoder(shared_bundle)
    config = shared_bundle.config
    position = 2 * config.num_key_value_heads * config.head_dim * 4
    for length in (3, 10 * WINDOW):
        decoder.reset()
        decoder.read(IDS[:length])
        sliding = resident_positions(shared_bundle.manifest.cache[-1], length)
        assert min(length, WINDOW) <= sliding < CAPACITY
        assert decoder.snapshot().bytes == (3 * sliding + length) * position
        assert decoder.buffers.bytes > decoder.snapshot().bytes


def test_a_snapshot_belongs_to_its_model(
    shared_bundle: Bundle, int8_bundle: Bundle, shared_checkpoint: Path, make_model: Callable[..., CausalLM]
) -> None:
    onnx, torch = OnnxDecoder(shared_bundle), TorchDecoder(make_model(shared_bundle.config))
    for decoder, others in (
        (onnx, [torch, OnnxDecoder(int8_bundle)]),
        (torch, [onnx, TorchDecoder(make_model(shared_bundle.config))]),
    ):
        decoder.read([1, 2, 3])  # type: ignore[attr-defined]
        for other in others:
            other.reset()
            other.read([9])
            with pytest.raises(SlmError, match="snapshot is not of"):
                other.restore(decoder.snapshot())  # type: ignore[attr-defined]
            assert other.length == 1
    OnnxDecoder(shared_bundle).restore(onnx.snapshot())  # the same model, opened again


@pytest.fixture
def cut_off() -> Iterator[Callable[[Any, str], None]]:
    """Makes a method raise KeyboardInterrupt after its work, like Ctrl-C during a step."""
    patch = pytest.MonkeyPatch()

    def cut(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def run(*args: Any, **options: Any) -> None:
            method(*args, **options)
            patch.undo()
            raise KeyboardInterrupt

        patch.setattr(owner, name, run)

    yield cut
    patch.undo()


def test_a_step_that_was_cut_off_leaves_nothing_read(
    shared_bundle: Bundle, make_model: Callable[..., CausalLM], cut_off: Callable[[Any, str], None]
) -> None:
    onnx, torch = OnnxDecoder(shared_bundle), TorchDecoder(make_model(shared_bundle.config))
    for decoder, owner, name in ((onnx, onnx, "run"), (torch, torch.model, "forward")):
        wanted = decoder.read(IDS[:20])  # type: ignore[attr-defined]
        cut_off(owner, name)
        with pytest.raises(KeyboardInterrupt):
            decoder.read([5])  # type: ignore[attr-defined]
        assert decoder.length == 0  # type: ignore[attr-defined]
        np.testing.assert_array_equal(decoder.read(IDS[:20]), wanted)  # type: ignore[attr-defined]
