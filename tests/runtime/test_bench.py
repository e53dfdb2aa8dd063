"""The figures of timed steps. The clock is simulated, so that nothing here depends on this machine's speed."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from slm.core.accounting import cache_bytes, weights_bytes
from slm.core.config import ModelConfig
from slm.core.contract import cache_layers
from slm.core.manifest import Bundle, seal
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.processes import resident_mib
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import bench, generation, streaming
from slm.runtime.bench import Case, Measured, OnnxRows, ReadProbe, Spread, measure
from slm.runtime.decoder import OnnxDecoder

# Tensors begin on pages, and those of less than a kilobyte stay inside the graph.
PADDING = 4096


class Clock:
    """A simulated clock, advanced by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (bench, generation, streaming):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    return clock


class Slow:
    """A decoder and its rows with known durations: `delays` by number of tokens, times the factor of the round."""

    context, vocab_size, description = 64, 7, "slow"

    def __init__(self, clock: Clock, delays: dict[int, float]) -> None:
        self.clock, self.delays = clock, delays
        self.factor, self.length = 1.0, 0
        self.visits: list[list[int]] = []

    def reset(self) -> None:
        self.length = 0

    def read(self, ids: Sequence[int]) -> Any:
        if self.length == 0:
            self.visits.append([])
        self.length += len(ids)
        self.visits[-1].append(len(ids))
        self.clock.now += self.delays[len(ids)] * self.factor
        return np.eye(self.vocab_size)[3]

    def rows(self, case: Case, new: int) -> "Slow":
        self.visits.append([])
        return self

    def step(self, ids: Any) -> Any:
        self.visits[-1].append(ids.shape[0])
        self.clock.now += self.delays[1] * ids.shape[0] * self.factor
        return np.zeros((ids.shape[0], self.vocab_size))


class Probe:
    """Memory that slows down with the decoder, and counts the rounds."""

    def __init__(self, decoder: Slow, factors: Sequence[float]) -> None:
        self.decoder, self.factors = decoder, iter(factors)

    def rate(self) -> float:
        self.decoder.factor = next(self.factors)
        return 1000.0 / self.decoder.factor


def test_a_decoder_is_measured_as_slow_as_it_is(clock: Clock) -> None:
    decoder = Slow(clock, {1: 0.5, 10: 2.0, 20: 8.0})
    cases = [Case(10), Case(20), Case(10, 4)]
    probe: Any = Probe(decoder, [1, 4, 2])
    first, second, rows = measure(Measured(decoder, decoder.rows, lambda case: 100), cases, probe, new=6, rounds=3)
    assert first.ttft_ms == Spread(4000, 2000, 8000) and second.ttft_ms == Spread(16_000, 8000, 32_000)
    assert first.prefill_tok_s == Spread(2.5, 1.25, 5) and second.prefill_tok_s == Spread(1.25, 0.625, 2.5)
    assert first.decode_tok_s == second.decode_tok_s == Spread(1, 0.5, 2)
    assert first.step_ms == Spread(1000, 500, 2000)
    assert rows.decode_tok_s == Spread(1, 0.5, 2)  # four rows at four times the price
    assert rows.step_ms == Spread(4000, 2000, 8000)
    assert rows.ttft_ms is None and rows.prefill_tok_s is None
    # 200 bytes a second of 1,000; the memory is as slow as the decoder in every round, which its share does not see.
    assert first.memory_share == Spread(0.2, 0.2, 0.2) and rows.memory_share == Spread(0.05, 0.05, 0.05)


def test_every_token_is_counted_and_cases_take_turns(clock: Clock) -> None:
    decoder = Slow(clock, {1: 0.5, 10: 2.0, 20: 8.0})
    measure(Measured(decoder, decoder.rows, lambda case: 1), [Case(20), Case(10, 3)], None, new=5, rounds=2)
    warm_up, *turns = decoder.visits
    assert warm_up == [10, 1, 1, 1]
    # A row's first token comes with the prompt. Several rows take a step before the clock starts.
    assert turns == [[20, 1, 1, 1, 1], [3, 3, 3, 3, 3]] * 2
    assert decoder.length == 0


def test_without_a_probe_there_is_no_share(clock: Clock) -> None:
    decoder = Slow(clock, {1: 0.5, 10: 2.0})
    (timing,) = measure(Measured(decoder, decoder.rows, lambda case: 1), [Case(10)], None, new=2, rounds=1)
    assert timing.memory_share is None and timing.decode_tok_s == Spread(2, 2, 2)


def test_an_interruption_tidies_up(clock: Clock) -> None:
    decoder = Slow(clock, {1: 0.5, 10: 2.0})
    ended = []
    progress: Any = SimpleNamespace(start=lambda *of: None, advance=lambda: None, finish=lambda: ended.append(True))

    def interrupted(case: Case, new: int) -> Slow:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(
            Measured(decoder, interrupted, lambda case: 1),
            [Case(10), Case(10, 2)],
            None,
            new=2,
            rounds=1,
            progress=progress,
        )
    assert ended and decoder.length == 0


def test_the_probe_reads_what_it_says(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(bench, "_PROBE_BYTES", 3 << 20)
    probe = ReadProbe(1 << 20, 2)
    reading = probe._read

    def timed(part: Any) -> None:
        reading(part)
        read.append(part.nbytes)
        clock.now += 0.25

    monkeypatch.setattr(probe, "_read", timed)
    assert probe.rate() == 3 * (1 << 20) / 0.5  # three passes of both threads' halves
    assert set(read) == {1 << 19}
    probe.close()


def test_a_probe_of_next_to_nothing() -> None:
    probe = ReadProbe(10, 2)
    assert probe.rate() > 0
    probe.close()


@pytest.fixture
def bundle_of(
    tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig, make_model: Callable[..., CausalLM]
) -> Callable[..., Bundle]:
    """Exports a model of the awkward config with changes."""
    names = count()

    def make(**changes: Any) -> Bundle:
        path = tmp_path / str(next(names))
        save_checkpoint(path / "c", make_model(config.model_copy(update=changes)), tokenizer, {})
        return export_bundle(path / "c", path / "onnx", ExportOptions(context=64))

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_step(bundle_of: Callable[..., Bundle], tied: bool) -> None:
    exported = bundle_of(tie_word_embeddings=tied)
    rows = np.random.default_rng(0).integers(320, size=(2, 32))
    text = TokenRows("random", rows)
    quantized = [
        quantize_bundle(exported, Path(f"made-{i}"), text, replace(settings, gate=Gate(None)), None, text)[0]
        for i, settings in enumerate((Settings(block_size=32), Settings(precision="int4", prefer="size")))
    ]
    for bundle in (exported, *quantized):
        graph = onnx.load(bundle.model_path).graph
        read = {t.name: onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer}
        rows_only = [] if tied else [name for name in read if name.startswith("model.embed_tokens.")]
        assert bool(rows_only) != tied  # the control: with these the sum is another
        wanted = sum(size for name, size in read.items() if name not in rows_only)
        assert bench.weight_bytes_read(bundle) == pytest.approx(wanted, abs=len(read) * PADDING, rel=0.02)
        if bundle is not exported:  # of integers to the byte, whatever the schemes
            beside = bundle.manifest.files[f"{bundle.manifest.model}_data"].bytes
            assert beside - bench.weight_bytes_read(bundle) == sum(read[name] for name in rows_only)


def test_the_weights_of_a_step_beside_stored_tables(shared_bundle: Bundle, tmp_path: Path) -> None:
    """Bundles of earlier versions store rotation tables among their weights, which a step does not read."""
    model = onnx.load(shared_bundle.model_path)
    config, context = shared_bundle.config, shared_bundle.manifest.context
    for kind in set(config.layer_types):
        for table in ("cos", "sin"):
            array = np.ones((context, config.head_dim // 2), np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"positions.{kind}_{table}"))
    shutil.copytree(shared_bundle.path, tmp_path / "old")
    name = shared_bundle.manifest.model
    (tmp_path / "old" / f"{name}_data").unlink()
    onnx.save(model, tmp_path / "old" / name, save_as_external_data=True, location=f"{Path(name).name}_data")
    old = seal(tmp_path / "old", shared_bundle.manifest)
    grown = old.manifest.files[f"{name}_data"].bytes - shared_bundle.manifest.files[f"{name}_data"].bytes
    assert grown > 2 * 2 * context * config.head_dim // 2 * 4 - 42 * PADDING  # they are there
    assert bench.weight_bytes_read(old) == pytest.approx(bench.weight_bytes_read(shared_bundle), abs=50 * PADDING)


def test_the_weights_of_a_checkpoint(config: ModelConfig) -> None:
    assert bench.float32_weight_bytes_read(config) == weights_bytes(config, 4)
    untied = config.model_copy(update={"tie_word_embeddings": False})
    assert bench.float32_weight_bytes_read(untied) == weights_bytes(config, 4)  # the head instead of the embedding


@pytest.mark.parametrize("positions", [1, 15, 16, 17, 200])
def test_the_caches_of_a_step(config: ModelConfig, positions: int) -> None:
    layers = cache_layers(config)
    wanted = cache_bytes(config, positions, kind="windowed_without_slack")
    assert bench.cache_bytes_read(layers, positions) == wanted
    assert 4 * bench.cache_bytes_read(cache_layers(config, dtype="int8"), positions) == wanted


def test_rows_begin_where_the_prompt_ends(shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = OnnxDecoder(shared_bundle, threads=1)
    masks: list[Any] = []
    run = decoder.run
    monkeypatch.setattr(
        decoder, "run", lambda ids, mask, *rest, **named: (masks.append(mask), run(ids, mask, *rest, **named))[1]
    )
    rows = OnnxRows(decoder, Case(40, 3), new=2)
    logits = rows.step(np.array([[5], [6], [5]]))
    assert logits.shape == (3, 320)
    np.testing.assert_array_equal(logits[0], logits[2])
    assert not np.allclose(logits[0], logits[1])
    rows.step(np.zeros((3, 1), np.int64))
    assert [mask.shape for mask in masks] == [(3, 41), (3, 42)] and all(mask.all() for mask in masks)


def test_rows_whose_caches_grow_have_read(shared_checkpoint: Path) -> None:
    decoder = OnnxDecoder(
        export_bundle(shared_checkpoint, Path("portable"), ExportOptions(target="portable")), threads=1
    )
    decoder.read([0] * 40)
    wanted = decoder.read([5])
    stepped = OnnxRows(decoder, Case(40, 2), new=2).step(np.array([[5], [6]]))
    np.testing.assert_allclose(stepped[0], wanted, atol=1e-4)
    assert not np.allclose(stepped[1], wanted, atol=1e-4)


def test_the_prompt_is_the_same_every_time() -> None:
    assert bench.prompt_ids(50, 7) == bench.prompt_ids(50, 7)
    assert set(bench.prompt_ids(50, 7)) == set(range(7))


def test_resident_memory() -> None:
    before = resident_mib()
    block = np.ones(40 << 17)  # 40 MiB
    after = resident_mib()
    assert before is not None and after is not None and 10 < before + 30 < after < before + 60, block.nbytes
