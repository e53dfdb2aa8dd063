"""Steps recorded as CUDA graphs, without CUDA: the test imitates onnxruntime's recording on the CPU.

`tests/peers/test_fake_cuda.py` uses onnxruntime's own recording with a driver that computes nothing.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import slm
from slm.core.errors import ArgumentError, SlmError
from slm.core.manifest import Bundle
from slm.export.bundle import ExportOptions, export_bundle
from slm.runtime import cuda_graph
from slm.runtime.batch import Batch
from slm.runtime.cuda_graph import StepGraphs, check_bundle
from slm.runtime.decoder import OnnxDecoder

# The same kernels with a longer mask: sums in float16 may differ in their last bit.
SAME_LOGITS = 2e-3


@pytest.fixture(scope="module")
def bundle(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(shared_checkpoint, tmp_path_factory.mktemp("cuda") / "onnx", ExportOptions(device="cuda"))


class Recording:
    """A session that runs a step three times in the call that records it, as onnxruntime does, and counts replays.

    Attributes:
        recorded: The names of graphs, in the order in which they were recorded.
        replays: How many runs were replays.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.recorded: list[str] = []
        self.replays = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions | None = None) -> None:
        assert options is not None  # without a name onnxruntime would record whatever runs
        graph = options.get_run_config_entry("gpu_graph_id")
        recorded = graph == "-1" or graph in self.recorded
        self.replays += graph in self.recorded
        for _ in range(1 if recorded else 3):
            self._session.run_with_iobinding(binding, None)
        if not recorded:
            self.recorded.append(graph)


def with_graphs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[OnnxDecoder, Recording]:
    """Returns a decoder whose steps are recorded in the CPU's memory, and its session."""
    monkeypatch.setattr(
        cuda_graph, "_on_gpu", lambda shape, dtype: ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)
    )
    decoder = OnnxDecoder(bundle, threads=1, cuda_graph=True)
    session = Recording(decoder.session)
    decoder.session = session  # type: ignore[assignment]
    decoder._graphs = StepGraphs(session, decoder.vocab_size)  # type: ignore[arg-type]
    return decoder, session


def steps(decoder: OnnxDecoder, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Reads tokens one by one; returns the logits after each token (tokens, V)."""
    return np.stack([decoder.read([token]).copy() for token in tokens])  # on the CPU, the next step overwrites them


def test_recorded_steps_are_the_same_steps(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """From before the window to past it, with a chunk and a rewind between; recording moves sliding caches up three times."""
    rng = np.random.default_rng(0)
    prompt, tokens = rng.integers(0, 320, 10).tolist(), rng.integers(0, 320, 30).tolist()
    found = []
    for decoder in (OnnxDecoder(bundle, threads=1), with_graphs(bundle, monkeypatch)[0]):
        decoder.read(prompt)
        logits = [steps(decoder, tokens), decoder.read_each([1, 2, 3])]
        decoder.rewind(decoder.length - 1)
        logits.append(steps(decoder, tokens))
        decoder.reset()
        decoder.read(prompt * 3)  # past the window before the first step
        found.append(np.concatenate([*logits, steps(decoder, tokens)]))
    np.testing.assert_allclose(found[1], found[0], atol=SAME_LOGITS)


def test_what_recording_moved_is_put_back(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: without the restore, a window past its end has lost two positions."""
    prompt = np.random.default_rng(1).integers(0, 320, 40).tolist()
    found = []
    for put_back in (True, False):
        decoder, _ = with_graphs(bundle, monkeypatch)
        if not put_back:
            monkeypatch.setattr("slm.runtime.cache.KVBuffers.put_sliding", lambda *_: None)
        decoder.read(prompt)
        found.append(decoder.read([7]).copy())
    assert np.abs(found[1] - found[0]).max() > 10 * SAME_LOGITS


def test_a_step_is_recorded_once_for_an_arrangement(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, session = with_graphs(bundle, monkeypatch)
    decoder.read([5, 6, 7])
    assert session.recorded == []  # several tokens
    steps(decoder, [1, 2, 3])
    assert session.recorded == ["1"] and session.replays == 3
    decoder.reset()
    decoder.read([5])
    assert len(session.recorded) == 1 and session.replays == 3  # a single token without a past
    steps(decoder, [1])
    assert len(session.recorded) == 1 and session.replays == 4
    batch = Batch(decoder, 3)
    slots = [batch.take() for _ in range(3)]
    for number, slot in enumerate(slots):
        slot.read(list(range(4 + number)))
    for count in (3, 2, 3, 2):
        batch.step(dict.fromkeys(slots[:count], 9))
    assert session.recorded == ["1", "2", "3"]
    thread = threading.Thread(target=lambda: steps(decoder, [1]))  # onnxruntime keeps graphs by thread
    session.recorded.clear()
    thread.start()
    thread.join()
    assert session.recorded == ["1"]


def test_longer_buffers_are_another_arrangement(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.runtime.cache.FIRST_CAPACITY", 32)
    decoder, session = with_graphs(bundle, monkeypatch)
    plain = OnnxDecoder(bundle, threads=1)
    tokens = np.random.default_rng(2).integers(0, 320, 80).tolist()
    for each in (decoder, plain):
        each.read(tokens[:3])
    found, wanted = steps(decoder, tokens), steps(plain, tokens)
    assert len(session.recorded) >= 3  # 32, 64 and 96 positions
    np.testing.assert_allclose(found, wanted, atol=SAME_LOGITS)


def test_steps_beyond_the_largest_number_of_graphs_run_as_usual(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "_MOST_GRAPHS", 1)
    decoder, session = with_graphs(bundle, monkeypatch)
    batch = Batch(decoder, 2)
    slots = [batch.take() for _ in range(2)]
    for slot in slots:
        slot.read([1, 2, 3])
    batch.step(dict.fromkeys(slots, 9))
    replays = session.replays
    batch.step({slots[0]: 9})
    assert session.recorded == ["1"] and session.replays == replays


def test_a_failed_step_says_so_and_is_forgotten(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, session = with_graphs(bundle, monkeypatch)
    decoder.read([5, 6, 7])

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA failure 900\nand more")

    monkeypatch.setattr(session, "run_with_iobinding", fail)
    with pytest.raises(SlmError, match=r"cannot run .*CUDA failure 900\)"):
        decoder.read([1])
    assert decoder.length == 0


def test_only_bundles_for_cuda_are_recorded(shared_bundle: Bundle, bundle: Bundle) -> None:
    check_bundle(bundle)
    with pytest.raises(SlmError, match="exported for cpu: CUDA graphs need"):
        OnnxDecoder(shared_bundle, cuda_graph=True)


def test_cuda_graphs_need_cuda(shared_bundle: Bundle, shared_checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match="cuda_graph requires CUDA"):
        slm.load(shared_bundle.path, cuda_graph=True)
    with pytest.raises(ArgumentError, match="cuda_graph is"):
        slm.load(shared_bundle.path, device="cuda", cuda_graph="yes")  # type: ignore[arg-type]
    with pytest.raises(SlmError, match="is a checkpoint; CUDA graphs require a bundle"):
        slm.load(shared_checkpoint, device="cuda", cuda_graph=True)


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench"])
def test_the_option_needs_the_device(slm: Any, command: str) -> None:
    result = slm(command, "--cuda-graph")
    assert result.code == 2 and "--cuda-graph needs --device cuda" in result.err
