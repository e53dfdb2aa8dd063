"""Adapters at run time: a bundle with slots answers as the merged model does, row by row, and without one as the base."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import slm as package
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.nn import load_checkpoint
from slm.export.bundle import ExportOptions, export_bundle
from slm.finetune.adapter import load_adapter
from slm.finetune.merge import merge
from slm.interchange.onnx_adapter import adapter_from_peft, write_onnx_adapter
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime.adapters import Adapter, checked, read_adapter, stacked
from slm.runtime.batch import Batch
from slm.runtime.decoder import OnnxDecoder

MakeAdapter = Callable[..., Path]

# Float32 sums in another order, at logits of magnitude 50.
TOLERANCE = 1e-4
# Weights and activations in 8 bits move random models' logits by 0.08; an adapter here moves them by several.
INT8_TOLERANCE = 0.3


def rows(bundle: Bundle) -> np.ndarray:
    return np.random.default_rng(3).integers(0, bundle.config.vocab_size, (2, 40))


def merged_logits(base: Path, adapter: Path, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return merge(base, adapter)(torch.from_numpy(ids)).numpy()


def answer(bundle: Bundle, adapter: Adapter | None, ids: np.ndarray) -> np.ndarray:
    decoder = OnnxDecoder(bundle)
    decoder.use(adapter)
    return decoder.logits(ids)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 3, "rslora": True}, {"target_modules": ("k_proj", "v_proj", "up_proj")}],
    ids=["all", "rslora", "some"],
)
def test_an_adapter_in_slots_is_the_merged_model(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, settings: dict[str, Any], make_adapter: MakeAdapter
) -> None:
    path = make_adapter(tmp_path / "a", shared_checkpoint, **settings)
    ids = rows(slotted)
    wanted = merged_logits(shared_checkpoint, path, ids)
    adapter = adapter_from_peft(path, slotted)
    np.testing.assert_allclose(answer(slotted, adapter, ids), wanted, atol=TOLERANCE)
    assert np.abs(answer(slotted, None, ids) - wanted).max() > 100 * TOLERANCE
    name = next(name for name in adapter.arrays if name.endswith("qkv_proj.B"))
    shifted = Adapter("wrong", adapter.arrays | {name: np.roll(adapter.arrays[name], 1, axis=2)})
    assert np.abs(answer(slotted, shifted, ids) - wanted).max() > 10 * TOLERANCE


def test_every_way_to_deploy_an_adapter_gives_the_same_logits(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """PyTorch with the adapter beside the weights and merged into them, PEFT on transformers, a file in onnxruntime."""
    path = make_adapter(tmp_path / "a", shared_checkpoint)
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(file, adapter_from_peft(path, slotted), slotted.manifest.provenance["weights_sha256"])
    ids = rows(slotted)
    tokens = torch.from_numpy(ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared_checkpoint, attn_implementation="eager")
    with torch.inference_mode():
        ways = {
            "unmerged": load_adapter(load_checkpoint(shared_checkpoint), path)(tokens).numpy(),
            "merged": merged_logits(shared_checkpoint, path, ids),
            "PEFT": peft.PeftModel.from_pretrained(theirs, path)(tokens).logits.numpy(),
            "onnxruntime": answer(slotted, read_adapter(file, slotted), ids),
        }
    far = {name: float(np.abs(logits - ways["unmerged"]).max()) for name, logits in ways.items()}
    assert max(far.values()) < TOLERANCE, far
    other = make_adapter(tmp_path / "b", shared_checkpoint, seed=2)
    assert np.abs(merged_logits(shared_checkpoint, other, ids) - ways["unmerged"]).max() > 100 * TOLERANCE


def test_without_an_adapter_it_is_the_base_bit_for_bit(
    slotted: Bundle, shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    ids = rows(slotted)
    wanted = OnnxDecoder(shared_bundle).logits(ids)
    decoder = OnnxDecoder(slotted)
    np.testing.assert_array_equal(decoder.logits(ids), wanted)
    decoder.use(adapter_from_peft(make_adapter(tmp_path / "a", shared_checkpoint), slotted))
    assert (decoder.logits(ids) != wanted).any()
    decoder.use(None)
    np.testing.assert_array_equal(decoder.logits(ids), wanted)


@pytest.mark.parametrize("smooth", [False, True])
def test_on_an_int8_base(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, smooth: bool, make_adapter: MakeAdapter
) -> None:
    """Smoothing changes what slots see; they do the same to the adapter."""
    ids = rows(slotted)
    settings = Settings(smooth=smooth, gate=Gate(1))
    made, _ = quantize_bundle(slotted, tmp_path / "int8", TokenRows("random", ids), settings)
    assert (made.manifest.quantization.smoothing is not None) == smooth  # type: ignore[union-attr]
    path = make_adapter(tmp_path / "a", shared_checkpoint)
    adapter = adapter_from_peft(path, made)
    wanted = merged_logits(shared_checkpoint, path, ids)
    found = np.abs(answer(made, adapter, ids) - wanted)
    assert found.max() < INT8_TOLERANCE < np.abs(answer(made, None, ids) - wanted).max()
    if smooth:  # as a graph would answer whose slots knew nothing of it
        name = "lora.model.layers.0.mlp.down_proj.A"
        product = name.removeprefix("lora.").removesuffix(".A")
        import onnx_ir as ir

        factors = ir.load(made.model_path).graph.initializers[f"{product}.slot_columns"].const_value.numpy()  # type: ignore[union-attr]
        ignorant = Adapter("wrong", adapter.arrays | {name: adapter.arrays[name] / factors})
        assert np.abs(answer(made, ignorant, ids) - wanted).mean() > found.mean()


def test_rows_of_a_batch_have_adapters_of_their_own(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    first = adapter_from_peft(make_adapter(tmp_path / "a", shared_checkpoint, seed=1), slotted)
    second = adapter_from_peft(
        make_adapter(tmp_path / "b", shared_checkpoint, seed=2, rank=2, target_modules=("o_proj", "q_proj")), slotted
    )
    adapters = [first, None, second, first]
    decoder = OnnxDecoder(slotted)
    batch = Batch(decoder, len(adapters))
    ids = rows(slotted)[0].tolist()
    slots = [batch.take(adapter) for adapter in adapters]
    texts: list[list[int]] = []
    tokens = {}
    for slot in slots:
        tokens[slot] = int(slot.read(ids[:20]).argmax())
        texts.append([tokens[slot]])
    for _ in range(24):  # past the window
        logits = batch.step(tokens)
        tokens = {slot: int(logits[slot].argmax()) for slot in slots}
        for text, slot in zip(texts, slots, strict=True):
            text.append(tokens[slot])
    for adapter, text in zip(adapters, texts, strict=True):
        decoder.use(adapter)
        decoder.reset()
        token = int(decoder.read(ids[:20]).argmax())
        alone = [token]
        for _ in range(24):
            alone.append(int(decoder.read([alone[-1]]).argmax()))
        assert text == alone
    assert texts[0] == texts[3] and texts[0] != texts[1] and texts[1] != texts[2]


def test_stacking_fills_up_with_zeros() -> None:
    one = Adapter("one", {"lora.x.A": np.ones((1, 4, 2), np.float32), "lora.x.B": np.ones((1, 2, 3), np.float32)})
    other = Adapter("other", {"lora.y.A": np.ones((1, 4, 1), np.float32), "lora.y.B": np.ones((1, 1, 3), np.float32)})
    assert stacked([None, None]) is None
    assert stacked([one, one]) is one
    both = stacked([one, None, other])
    assert both is not None
    assert both.arrays["lora.x.A"].shape == (3, 4, 2) and both.arrays["lora.y.B"].shape == (3, 1, 3)
    assert both.arrays["lora.x.A"][0].all() and not both.arrays["lora.x.A"][1:].any()


def test_what_was_read_with_one_adapter_is_not_taken_for_another(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    adapter = adapter_from_peft(make_adapter(tmp_path / "a", shared_checkpoint), slotted)
    decoder = OnnxDecoder(slotted)
    decoder.use(adapter)
    decoder.read([1, 2, 3])
    snapshot = decoder.snapshot()
    decoder.use(None)
    assert decoder.length == 0
    with pytest.raises(SlmError, match="snapshot is not of"):
        decoder.restore(snapshot)
    decoder.use(adapter)
    decoder.restore(snapshot)
    assert decoder.length == 3


def test_a_file_is_the_adapter(
    slotted: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    adapter = adapter_from_peft(make_adapter(tmp_path / "a", shared_checkpoint), slotted)
    file = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(file, adapter, slotted.manifest.provenance["weights_sha256"])
    again = read_adapter(file, slotted)
    assert again.digest == adapter.digest
    write_onnx_adapter(file, adapter, "0" * 8 + "f" * 56)
    assert read_adapter(file, slotted).digest == adapter.digest  # 0: nobody knows of which base
    write_onnx_adapter(file, adapter, "1" * 64)
    with pytest.raises(SlmError, match="other weights"):
        read_adapter(file, slotted)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SlmError, match="not an adapter that onnxruntime can read"):
        read_adapter(file, slotted)


def test_what_slots_do_not_hold_is_refused(
    slotted: Bundle, shared_bundle: Bundle, shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    plain = make_adapter(tmp_path / "plain", shared_checkpoint)
    refused = partial(pytest.raises, SlmError)
    with refused(match="no slots"):
        adapter_from_peft(plain, shared_bundle)
    with refused(match="DoRA"):
        adapter_from_peft(make_adapter(tmp_path / "dora", shared_checkpoint, dora=True), slotted)
    with refused(match="more than the slots' products"):
        adapter_from_peft(make_adapter(tmp_path / "turns", shared_checkpoint, token_ids=(1, 2)), slotted)
    for key, words in (
        ("weights_sha256", "trained on elsewhere"),
        ("tokenizer_sha256", "with a tokenizer that differs"),
    ):
        (plain / "slm.json").write_text(json.dumps({"base": {"path": "elsewhere", key: "0" * 64}}))
        with refused(match=words):
            adapter_from_peft(plain, slotted)
        with refused(match=words):
            merge(shared_checkpoint, plain)
    good = adapter_from_peft(make_adapter(tmp_path / "good", shared_checkpoint), slotted)
    name, array = next(iter(good.arrays.items()))
    for wrong, words in (
        ({"lora.other.A": array}, "no slot"),
        ({name: array[:, 1:]}, "channels"),
        ({name: array[:, :, 1:]}, "different ranks"),
        ({name: array.astype(np.float64)}, "channels"),
        ({name: np.full_like(array, np.nan)}, "not numbers"),
    ):
        with refused(match=words):
            checked(Adapter("wrong", good.arrays | wrong), slotted, tmp_path)
    with refused(match="only fused bundles for the CPU support adapter slots"):
        export_bundle(shared_checkpoint, tmp_path / "portable", ExportOptions(target="portable", adapter_slots=True))


def test_the_commands(
    slm: Callable[..., Any], shared_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    peft = make_adapter(tmp_path / "pirate", shared_checkpoint)
    assert slm("export", "--onnx", "--adapter-slots", shared_checkpoint, "--out", "slots").code == 0
    result = slm("export", "--onnx-adapter", shared_checkpoint, "--adapter", peft, "--json")
    assert result.code == 0
    file = Path(json.loads(result.out)["adapter"])
    assert file.name == "pirate.onnx_adapter" and json.loads(result.out)["products"] > 0
    options = ("-p", "The fox", "--greedy", "--max-new-tokens", 12, "--json")
    texts = {}
    for name, arguments in (
        ("base", ("slots",)),
        ("file", ("slots", "--adapter", file)),
        ("peft", ("slots", "--adapter", peft)),
        ("torch", (shared_checkpoint, "--adapter", peft)),
    ):
        result = slm("generate", *arguments, *options)
        assert result.code == 0, result.err
        texts[name] = json.loads(result.out)["text"]
    assert texts["file"] == texts["peft"] == texts["torch"] != texts["base"]
    assert package.load("slots", adapter=file).generate("The fox", max_new_tokens=12, temperature=0) == texts["file"]
    for arguments in (
        ("export", "--onnx", "--adapter-slots", "--adapter", peft, shared_checkpoint),
        ("export", "--onnx-adapter", shared_checkpoint),
    ):
        assert slm(*arguments).code == 2
