"""A 4-bit table with the rows of frequent tokens in 8 bits: the choice of tokens, both uses of the rows, and the search."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.core.errors import SlmError
from slm.core.manifest import Bundle, Scheme, seal
from slm.core.progress import Silent
from slm.export.graph import graph_tensors
from slm.export.graph.blocks import parts_of
from slm.export.verify import verify_bundle
from slm.quantize.decide import decide
from slm.quantize.frequent import FrequentTokens, frequent_rows, frequent_tokens
from slm.quantize.instrumented import InstrumentedModel
from slm.quantize.linears import EMBEDDING, Linear, linears_of
from slm.quantize.make import quantize_bundle
from slm.quantize.plan import INT4, INT8, QuantizationPlan, bytes_of, schemes_of, with_frequent
from slm.quantize.quality import kl_sum
from slm.quantize.quantizer import quantizer_of
from slm.quantize.rounding import restored
from slm.quantize.search import Budget, Candidates, Choice
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.quantize.write import write_graph
from slm.runtime.decoder import OnnxDecoder

TOKENS, COUNT = 64, 40


def settings(**options: Any) -> Settings:
    return Settings(**{"precision": "int4", "smooth": False, "gate": Gate(None), "cache": "float32"} | options)


def tokens_of(source: Bundle, text: TokenRows) -> FrequentTokens:
    weight = graph_tensors(source.model_path)[f"{EMBEDDING}.weight"]
    return frequent_tokens(source, weight, linears_of(source.config)[0], text, Silent())


def test_tokens_are_ranked_by_text_and_predictions(trained_bundle: Bundle, story_rows: TokenRows) -> None:
    found = tokens_of(trained_bundle, story_rows)
    counts = list(found.others)
    assert counts == [1, 2, 4, 8, 16, 32, 64] and len(found.ids) == 64  # up to a quarter of 320
    assert len(set(found.ids.tolist())) == 64
    shares = list(found.others.values())
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1
    # The share is an average of the predictions and of the text. Both are measured here on all rows.
    head, rows = linears_of(trained_bundle.config)[0], story_rows.rows
    model = InstrumentedModel(trained_bundle, [head])
    logits = np.concatenate([model.predictions(row) for row in rows]).astype(np.float64)
    predicted = np.exp(logits - logits.max(axis=1, keepdims=True))
    predicted = (predicted / predicted.sum(axis=1, keepdims=True)).mean(axis=0)
    counted = np.bincount(rows.ravel(), minlength=320) / rows.size
    both = (predicted + counted) / 2
    wanted = 1 - np.sort(both)[::-1][:64].sum()
    assert found.others[64] == pytest.approx(wanted, rel=0.2)  # other rows than those that ranked the tokens
    assert both[found.ids].sum() == pytest.approx(1 - wanted, rel=0.01)
    # Negative control: a text of one token, which the model does not predict, is ranked by its count.
    rare = int(np.argmin(both))
    assert tokens_of(trained_bundle, TokenRows("rare", np.full((2, 8), rare))).ids[0] == rare != found.ids[0]


def test_enough_tokens() -> None:
    shares = {1: 0.5, 2: 0.04, 4: 0.01, 8: 0.001}
    assert FrequentTokens(np.arange(8), shares).enough == 4
    assert FrequentTokens(np.arange(2), {1: 0.5, 2: 0.2}).enough == 2


def plan_with(source: Bundle, scheme: Scheme, text: TokenRows) -> QuantizationPlan:
    schemes = schemes_of(linears_of(source.config), INT8["auto"]) | {EMBEDDING: scheme}
    return QuantizationPlan(schemes, "nearest", frequent=tokens_of(source, text))


def written(source: Bundle, scheme: Scheme, text: TokenRows, directory: Path) -> Bundle:
    """Returns a bundle with 8-bit layers and a table of this scheme."""
    directory.mkdir()
    with quantizer_of(source, settings(), text, text, Silent(), directory.parent) as quantizer:
        plan = plan_with(source, scheme, text)
        return write_graph(source, plan, quantizer.tensors(plan), directory)


@pytest.mark.parametrize("batch", [1, 2])
def test_frequent_rows_are_those_of_an_eight_bit_table(
    trained_bundle: Bundle, story_rows: TokenRows, tmp_path: Path, batch: int
) -> None:
    """After frequent tokens, hidden states are equal, and the logits of frequent tokens are bit for bit those of 8 bits."""
    four = Scheme(bits=4, block_size=64, zero_points=True)
    mixed, plain, eight = (
        OnnxDecoder(written(trained_bundle, scheme, story_rows, tmp_path / name))
        for name, scheme in (
            ("mixed", with_frequent(four, COUNT)),
            ("plain", four),
            ("eight", Scheme(bits=8, block_size=64)),
        )
    )
    ids = np.sort(tokens_of(trained_bundle, story_rows).ids[:COUNT])
    others = np.setdiff1d(np.arange(320), ids)

    read = np.resize(ids, (batch, 12))
    found, wanted, coarse = (decoder.logits(read) for decoder in (mixed, eight, plain))
    np.testing.assert_array_equal(found[..., ids], wanted[..., ids])
    assert np.abs(found[..., others] - wanted[..., others]).max() > 1e-3
    assert np.abs(coarse[..., ids] - wanted[..., ids]).max() > 1e-3  # negative control
    # Other tokens have their 4-bit embeddings and logits.
    read = np.resize(others, (batch, 12))
    found, coarse = (decoder.logits(read) for decoder in (mixed, plain))
    np.testing.assert_array_equal(found[..., others], coarse[..., others])
    assert np.abs(found[..., ids] - coarse[..., ids]).max() > 1e-3


def test_the_divergence_is_smaller(trained_bundle: Bundle, story_rows: TokenRows, tmp_path: Path) -> None:
    """Only the table changes; on rows that neither GPTQ nor the ranking has read."""
    held_out, head = story_rows.first(4, TOKENS), linears_of(trained_bundle.config)[0]
    model = InstrumentedModel(trained_bundle, [head])
    before = [model.predictions(row) for row in held_out.rows]
    text = story_rows.after(4)
    with quantizer_of(
        trained_bundle, settings(head_bits=4, prefer="size"), text, held_out, Silent(), tmp_path
    ) as quantizer:
        plan = decide(quantizer)
        four = plan.rounded[EMBEDDING]
        scheme = plan.schemes[EMBEDDING]
        weight = quantizer.weights[f"{EMBEDDING}.weight"]
        assert plan.frequent is not None and scheme.frequent == plan.frequent.enough
        share = 1 - plan.frequent.others[scheme.frequent]
        assert plan.decisions()["frequent_tokens"] == scheme.frequent
        assert plan.decisions()["frequent_share"] == pytest.approx(share, abs=1e-4)
        both = {**four, **frequent_rows(weight, plan.frequent.ids, scheme)}

    def kl(weight: np.ndarray) -> float:
        return sum(
            kl_sum(old, model.predictions(row, {EMBEDDING: weight}))
            for row, old in zip(held_out.rows, before, strict=True)
        )

    mixed, plain = kl(restored(both, scheme)), kl(restored(four, with_frequent(scheme, 0)))
    others = plan.frequent.others[scheme.frequent]
    assert mixed < 2 * others * plain and others < 0.3, (mixed, plain, others)


def test_rows_add_their_bytes(trained_bundle: Bundle, story_rows: TokenRows, tmp_path: Path) -> None:
    four = Scheme(bits=4, block_size=32, zero_points=True, half=True)
    added = with_frequent(four, 10).bytes(320, 64) - four.bytes(320, 64)
    assert added == 10 * (64 + 2 * 2 + 8)  # integers, float16 scales of two blocks, the id
    scheme = Scheme(bits=4, block_size=64, zero_points=True, frequent=COUNT)
    assert scheme.name == "int4 in blocks of 64 with 40 rows in int8"
    made = written(trained_bundle, scheme, story_rows, tmp_path / "made")
    stored = graph_tensors(made.model_path)
    sizes = [stored[f"{EMBEDDING}.{part}"].nbytes for part in parts_of(scheme)]
    assert sum(sizes) == scheme.bytes(320, 64)
    ids = stored[f"{EMBEDDING}.frequent_ids"]
    assert (np.diff(ids) > 0).all() and set(ids) == set(tokens_of(trained_bundle, story_rows).ids[:COUNT])


def test_the_number_of_rows_is_a_choice_of_the_search() -> None:
    """Rows come first, because few bytes remove most of the divergence; then layers and the rest of the table."""
    linears = [Linear("table", "head", 4096, 128), *[Linear(f"l{i}", "layer", 256, 128, i) for i in range(4)]]
    four, eight = Scheme(bits=4, block_size=128, zero_points=True), Scheme(bits=8, block_size=128)
    table = [
        (four, 0.05),
        *[(with_frequent(four, n), 0.05 * left) for n, left in ((64, 0.3), (256, 0.02))],
        (eight, 0.0),
    ]
    choices = {linear.path: [Choice(four, 0.01), Choice(eight, 0.0)] for linear in linears[1:]}
    choices["table"] = [Choice(*each) for each in table]
    low = {linear.path: four for linear in linears}
    candidates, least = Candidates(linears, low, choices), bytes_of(linears, low)

    def chosen(budget: Budget) -> tuple[str, int]:
        schemes = candidates.choose(budget)
        return schemes["table"].name, sum(schemes[f"l{i}"].bits == 8 for i in range(4))

    rows = {n: with_frequent(four, n).bytes(4096, 128) - four.bytes(4096, 128) for n in (64, 256)}
    layer = eight.bytes(256, 128) - four.bytes(256, 128)
    names = {n: with_frequent(four, n).name for n in (0, 64, 256)}
    assert chosen(Budget(bytes=least)) == (names[0], 0)
    assert chosen(Budget(bytes=least + rows[64])) == (names[64], 0)
    assert chosen(Budget(bytes=least + rows[256])) == (names[256], 0)
    assert chosen(Budget(bytes=least + rows[256] + 4 * layer)) == (names[256], 4)
    assert chosen(Budget(bytes=least + 1_000_000)) == ("int8 in blocks of 128", 4)
    assert chosen(Budget(kl_nats=0.041)) == (names[256], 0)
    assert chosen(Budget(kl_nats=0.0)) == ("int8 in blocks of 128", 4)
    with pytest.raises(SlmError, match="the weights take at least"):
        candidates.choose(Budget(bytes=least - 1))


def test_a_target_size_between_four_and_eight_bits_adds_rows(
    trained_bundle: Bundle, story_rows: TokenRows, tmp_path: Path
) -> None:
    def made(size: int) -> QuantizationPlan:
        options = settings(target_bytes=size, method="searched")
        with quantizer_of(trained_bundle, options, story_rows, story_rows, Silent(), tmp_path) as quantizer:
            plan = decide(quantizer)
            assert quantizer.bytes(plan) <= size
            return plan

    options = settings(head_bits=4, prefer="size", method="searched")
    with quantizer_of(trained_bundle, options, story_rows, story_rows, Silent(), tmp_path) as quantizer:
        plan = decide(quantizer)
        table = plan.schemes[EMBEDDING]
        plain = quantizer.bytes(plan.with_schemes({**plan.schemes, EMBEDDING: with_frequent(table, 0)}))
        enough = quantizer.bytes(plan)
    assert table.frequent and enough > plain
    assert made(plain).schemes[EMBEDDING] == with_frequent(table, 0)
    assert made(enough + (1 << 12)).schemes[EMBEDDING].frequent > 0
    assert made(1 << 30).schemes[EMBEDDING].bits == 8


def test_larger_blocks_are_a_choice_of_the_search(
    trained_bundle: Bundle, story_rows: TokenRows, tmp_path: Path
) -> None:
    """GPTQ rounds layers in both sizes of blocks, and a smaller target uses the larger blocks for some of them."""

    def plan_for(size: int, **options: Any) -> QuantizationPlan:
        asked = settings(target_bytes=size, head_bits=4, **options)
        with quantizer_of(trained_bundle, asked, story_rows, story_rows, Silent(), tmp_path) as quantizer:
            return decide(quantizer)

    linears = linears_of(trained_bundle.config)
    layers = [linear for linear in linears if linear.role == "layer"]
    ample = plan_for(1 << 30)
    assert {linear.path for linear in layers if linear.inputs % 64 == 0} == set(ample.coarser)
    assert all(each.scheme.block_size == 64 and 0.9 < each.error < 4 for each in ample.coarser.values())
    assert sum(each.error for each in ample.coarser.values()) > len(ample.coarser)
    small = schemes_of(linears, INT4) | {EMBEDDING: with_frequent(ample.schemes[EMBEDDING], 0)}
    with quantizer_of(trained_bundle, settings(), story_rows, story_rows, Silent(), tmp_path) as quantizer:
        size = quantizer.bytes(QuantizationPlan(small, "gptq")) - 1  # less than blocks of 32 in all layers take
        plan = plan_for(size)
        assert quantizer.bytes(plan) <= size
    used = [path for path, each in plan.coarser.items() if plan.schemes[path] == each.scheme]
    assert used
    for path in used:
        assert plan.rounded[path] is plan.coarser[path].rounded
    with pytest.raises(SlmError, match="the weights take at least"):
        plan_for(size, block_size=32)


def altered(bundle: Bundle, out: Path, name: str, change: Callable[[np.ndarray], None]) -> Bundle:
    """Returns a copy with one changed tensor."""
    shutil.copytree(bundle.path, out)
    model = ir.load(out / bundle.manifest.model)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        if value.name == f"{EMBEDDING}.{name}":
            change(array)
        value.const_value = ir.tensor(array, name=value.name, dtype=value.dtype)
    ir.save(model, out / bundle.manifest.model, external_data=f"{bundle.model_path.name}_data")
    return Bundle.open(seal(out, bundle.manifest).path, trust=True)


@pytest.fixture(scope="module")
def made(trained_bundle: Bundle, story_rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("made") / "made"
    options = settings(head_bits=4, prefer="size", method="searched")
    return quantize_bundle(trained_bundle, out, story_rows.first(4, TOKENS), options, None, story_rows.after(4))[0]


def test_verification(made: Bundle, trained_checkpoint: Path, tmp_path: Path) -> None:
    verify_bundle(made, trained_checkpoint, Silent())

    def one_step(array: np.ndarray) -> None:
        array.flat[77] += 1 if array.flat[77] < 255 else -1

    def other_token(array: np.ndarray) -> None:
        array[0] = np.setdiff1d(np.arange(320), array)[0]

    for name, change in (("frequent_quantized", one_step), ("frequent_ids", other_token)):
        with pytest.raises(SlmError, match="does not match the checkpoint"):
            verify_bundle(altered(made, tmp_path / name, name, change), trained_checkpoint, Silent())


def test_the_manifest_must_have_the_number_of_rows(made: Bundle, tmp_path: Path) -> None:
    quantization = made.manifest.quantization
    assert quantization is not None
    scheme = quantization.schemes[EMBEDDING]
    for count in (0, scheme.frequent - 1):
        out = tmp_path / str(count)
        shutil.copytree(made.path, out)
        schemes = {**quantization.schemes, EMBEDDING: with_frequent(scheme, count)}
        seal(
            out, made.manifest.model_copy(update={"quantization": quantization.model_copy(update={"schemes": schemes})})
        )
        with pytest.raises(SlmError, match="export the bundle again"):
            Bundle.open(out)
    Bundle.open(made.path)
