"""Caches on a device: bit-identical to caches in numpy's memory, and allocated on the device where attention runs.

There is no GPU here. onnxruntime's own values and addresses are tested with the device "cpu", where numpy also sees only
copies; requests for CUDA are recorded.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from slm.core.contract import CACHE_SLACK
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.batch import Batch
from slm.runtime.bench import Case, OnnxRows
from slm.runtime.cache import KVBuffers
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.memory import Buffer, DeviceBuffer, HostBuffer
from slm.runtime.sampling import GREEDY
from slm.runtime.session import takes_from
from tests.runtime.texts import completed_together

WINDOW = 16
CAPACITY = WINDOW + CACHE_SLACK
IDS = np.random.default_rng(11).integers(0, 320, 200).tolist()
KINDS = ["float32", "int8 caches", "cuda", "portable"]


@pytest.fixture(scope="module")
def bundles(
    shared_checkpoint: Path, shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    home = tmp_path_factory.mktemp("bundles")
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
    return {
        "float32": shared_bundle,
        "int8 caches": quantize_bundle(shared_bundle, home / "int8", text, Settings(gate=Gate(1), cache="int8"))[0],
        "cuda": export_bundle(shared_checkpoint, home / "cuda", ExportOptions(device="cuda")),
        "portable": export_bundle(shared_checkpoint, home / "portable", ExportOptions(target="portable")),
    }


def on_device(bundle: Bundle) -> OnnxDecoder:
    """A decoder with device caches, where the device is the CPU."""
    decoder = OnnxDecoder(bundle, threads=1)
    decoder.place = partial(DeviceBuffer, session=decoder.session, device="cpu")
    decoder.reset()
    assert isinstance(decoder.buffers, KVBuffers)
    assert all(isinstance(buffer, DeviceBuffer) for buffer in decoder.buffers._buffers.values())
    return decoder


def same(decoders: list[OnnxDecoder], *steps: Callable[[OnnxDecoder], Any]) -> None:
    """Runs the same calls on two decoders, and compares their results and caches bit for bit."""
    for step in steps:
        ours, theirs = (step(decoder) for decoder in decoders)
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
    one, other = decoders
    assert one.length == other.length and one.buffers.bytes == other.buffers.bytes
    for layer in one.bundle.manifest.cache:
        for side in ("key", "value"):
            kept = [decoder.buffers.resident(layer, side, one.length) for decoder in decoders]  # type: ignore[arg-type]
            assert kept[0].size == kept[1].size > 0
            np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_same_bits(bundles: dict[str, Bundle], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, grows, continues until the sliding buffers have moved up, rewinds, takes a snapshot and restores it."""
    monkeypatch.setattr("slm.runtime.cache.FIRST_CAPACITY", 8)
    decoders = [on_device(bundles[kind]), OnnxDecoder(bundles[kind], threads=1)]
    same(decoders, lambda decoder: decoder.read(IDS[:5]))
    for token in IDS[5 : CAPACITY + 6]:
        same(decoders, lambda decoder, token=token: decoder.read([token]))  # type: ignore[misc]
    assert decoders[0].buffers.growths > 3
    snapshots = [decoder.snapshot() for decoder in decoders]
    for key, array in snapshots[0].row.arrays.items():
        np.testing.assert_array_equal(array, snapshots[1].row.arrays[key])
    kept = {key: array.copy() for key, array in snapshots[0].row.arrays.items()}
    back = CAPACITY + 5 if kind == "cuda" else CAPACITY + 1  # without slack little can be forgotten
    same(decoders, lambda decoder: decoder.rewind(back), lambda decoder: decoder.read_each(IDS[:3]))
    same(decoders, lambda decoder: decoder.reset(), lambda decoder: decoder.read(IDS[60:170]))
    assert all((array == kept[key]).all() for key, array in snapshots[0].row.arrays.items())  # a copy, not a view
    crossed = dict(zip(decoders, reversed(snapshots), strict=True))  # either takes the other's
    same(decoders, lambda decoder: decoder.restore(crossed[decoder]), lambda decoder: decoder.read([7]))


def test_what_is_written_to_another_place_shows(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an address that is wrong by one position."""
    decoders = [on_device(shared_bundle), OnnxDecoder(shared_bundle, threads=1)]
    for decoder in decoders:
        decoder.read(IDS[: CAPACITY - 2])
        decoder.rewind(WINDOW)
    same(decoders, lambda decoder: decoder.read([7]))
    snapshot = decoders[1].snapshot()
    address = DeviceBuffer._address
    monkeypatch.setattr(
        DeviceBuffer, "_address", lambda self, row, head=0, position=0: address(self, row, head, max(0, position - 1))
    )
    for decoder in decoders:
        decoder.restore(snapshot)
    with pytest.raises(AssertionError):
        same(decoders, lambda decoder: decoder.read([7]))


def test_a_batch(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths, more of them than slots, so that rows change places and the slab grows."""
    monkeypatch.setattr("slm.runtime.cache.FIRST_CAPACITY", 8)
    prompts = [IDS[length : 2 * length] for length in (1, 9, WINDOW, CAPACITY + 1, 60, 3)]
    made = [
        completed_together(decoder, prompts, [GREEDY] * len(prompts), 25, (), slots=3)
        for decoder in (on_device(shared_bundle), OnnxDecoder(shared_bundle, threads=1))
    ]
    assert made[0] == made[1] and len({tuple(text) for text in made[0]}) == len(prompts)


def test_rows_that_change_places(shared_bundle: Bundle) -> None:
    logits = []
    for decoder in (on_device(shared_bundle), OnnxDecoder(shared_bundle, threads=1)):
        batch = Batch(decoder, 3)
        slots = [batch.take() for _ in range(3)]
        for slot, start in zip(slots, (0, 40, 90), strict=True):
            slot.read(IDS[start : start + 20 + start // 9])
        logits.append([batch.step({slots[2]: 9})[slots[2]], *batch.step({slots[0]: 5, slots[1]: 6}).values()])
    np.testing.assert_array_equal(*logits)


def test_complete_rows_and_rows_that_are_timed(shared_bundle: Bundle) -> None:
    decoders = [on_device(shared_bundle), OnnxDecoder(shared_bundle, threads=1)]
    ids = np.array(IDS).reshape(4, 50)
    np.testing.assert_array_equal(*(decoder.logits(ids) for decoder in decoders))
    rows = [OnnxRows(decoder, Case(40, 3), 4) for decoder in decoders]
    np.testing.assert_array_equal(*(each.step(np.full((3, 1), 7)) for each in rows))


@pytest.mark.parametrize("place", [HostBuffer, "device"])
def test_parts_are_where_they_should_be(shared_bundle: Bundle, place: Any) -> None:
    """Compared with a plain array: rows, heads and positions, also of a view; nothing beside them changes."""
    plain = np.random.default_rng(2).normal(size=(3, 2, 5, 4)).astype(np.float16)
    if place == "device":
        place = partial(DeviceBuffer, session=OnnxDecoder(shared_bundle).session, device="cpu")
    buffer: Buffer = place(plain.copy())
    assert buffer.shape == plain.shape and buffer.nbytes == plain.nbytes
    view = buffer.rows(1, 3)
    assert view.shape == (2, 2, 5, 4) and view.nbytes == plain[1:].nbytes
    np.testing.assert_array_equal(view.read(slice(1, 2), 1, 4), plain[2:3, :, 1:4])
    np.testing.assert_array_equal(buffer.read(slice(None), 0, 5), plain)
    assert buffer.read(slice(0, 1), 2, 2).shape == (1, 2, 0, 4)
    new = np.random.default_rng(3).normal(size=(1, 2, 2, 4)).astype(np.float16)
    view.write(slice(0, 1), 3, new)
    buffer.write(slice(0, 1), 0, new[:, :, :0])
    plain[1:2, :, 3:] = new
    np.testing.assert_array_equal(buffer.read(slice(None), 0, 5), plain)


class Asked:
    """Records what the code requests from onnxruntime for a device, and runs it on the CPU."""

    def __init__(self) -> None:
        self.allocated: list[str] = []
        self.bound: dict[str, str] = {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A session "on CUDA" whose device memory is the CPU's; attention runs where caches are float16."""
    asked = Asked()
    allocate, binding = ort.OrtValue.ortvalue_from_shape_and_type, ort.IOBinding
    into, out_of = binding.bind_input, binding.bind_output

    def allocated(shape: Any, kind: Any, device: str = "cpu", device_id: int = 0) -> Any:
        asked.allocated.append(device)
        return allocate(shape, kind, "cpu", device_id)

    def bound(bind: Any, self: Any, name: str, device: str = "cpu", *rest: Any) -> Any:
        asked.bound[name] = device
        return bind(self, name, "cpu", *rest)

    def expected(session: ort.InferenceSession) -> list[Any]:
        wants = {"tensor(float16)": "Cuda"}
        return [SimpleNamespace(name=wants.get(each.type, "Cpu")) for each in session.get_inputs()]

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", staticmethod(allocated))
    monkeypatch.setattr(binding, "bind_input", lambda *args: bound(into, *args))
    monkeypatch.setattr(binding, "bind_output", lambda *args: bound(out_of, *args))
    monkeypatch.setattr(ort.InferenceSession, "get_input_memory_infos", expected)
    open_session = OnnxDecoder.__init__.__globals__["open_session"]
    monkeypatch.setattr(
        "slm.runtime.decoder.open_session", lambda bundle, device, *rest: open_session(bundle, "cpu", *rest)
    )
    return asked


def test_a_bundle_for_cuda_has_its_caches_there(bundles: dict[str, Bundle], asked: Asked) -> None:
    bundle = bundles["cuda"]
    decoder = OnnxDecoder(bundle, "cuda", threads=1)
    assert asked.allocated == ["cuda"] * 2 * len(bundle.manifest.cache)
    logits = decoder.read(IDS[:40])
    specs = [*bundle.manifest.inputs, *bundle.manifest.outputs]
    caches = {spec.name for spec in specs if spec.dtype == "float16"}
    assert len(caches) == 4 * len(bundle.manifest.cache)
    assert {name for name, device in asked.bound.items() if device == "cuda"} == caches
    assert asked.bound["logits"] == "cpu"
    assert decoder.description.endswith("on CUDA, 1 thread, float16")
    assert not decoder.steps_alike
    np.testing.assert_array_equal(logits, OnnxDecoder(bundle, threads=1).read(IDS[:40]))
    decoder.restore(decoder.snapshot())
    Batch(decoder, 2).take().read([1, 2])
    assert set(asked.allocated) == {"cuda"}


@pytest.mark.parametrize("kind", ["float32", "int8 caches", "portable"])
def test_other_bundles_have_them_beside_the_attention(bundles: dict[str, Bundle], kind: str, asked: Asked) -> None:
    decoder = OnnxDecoder(bundles[kind], "cuda", threads=1)
    decoder.read(IDS[:40])
    decoder.read([3])
    assert not asked.allocated and "cuda" not in asked.bound.values()
    assert " on CUDA (attention on the CPU), " in decoder.description


def test_caches_that_grow_stay_where_attention_runs(
    bundles: dict[str, Bundle], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.runtime.decoder.takes_from", lambda session, inputs: "cuda")
    bundle = bundles["portable"]
    decoder = OnnxDecoder(bundle, "cuda", threads=1)
    logits = [decoder.read(IDS[:40]), decoder.read([3])]
    presents = {name for name, device in asked.bound.items() if device == "cuda"}
    assert presents == {spec.name for spec in bundle.manifest.outputs if spec.name != "logits"}
    assert asked.bound["logits"] == "cpu" and " on CUDA, " in decoder.description
    host = OnnxDecoder(bundle, threads=1)
    np.testing.assert_array_equal(logits, [host.read(IDS[:40]), host.read([3])])
    assert decoder.buffers.bytes == host.buffers.bytes == decoder.snapshot().bytes


def test_where_a_session_wants_its_inputs(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = OnnxDecoder(shared_bundle)
    past = [name for name in (each.name for each in decoder.session.get_inputs()) if name.startswith("past")]
    assert takes_from(decoder.session, past) == "cpu" and " on CPU, " in decoder.description
    places = {name: "Cuda" for name in past} | {"input_ids": "CudaPinned", "attention_mask": "Cpu"}
    monkeypatch.setattr(
        ort.InferenceSession,
        "get_input_memory_infos",
        lambda session: [SimpleNamespace(name=places[each.name]) for each in session.get_inputs()],
    )
    assert takes_from(decoder.session, past) == "cuda"
    assert takes_from(decoder.session, ["input_ids", "attention_mask"]) == "cpu"
    places[past[0]] = "Cpu"
    with pytest.raises(SlmError, match="CUDA in some layers and on the CPU in others") as caught:
        takes_from(decoder.session, past)
    assert caught.value.hint == "--device cpu"
