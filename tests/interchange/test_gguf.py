"""GGUF: what is written comes back, in every type; what Gemma 3 in llama.cpp cannot say is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from slm.core.checkpoint import read_config
from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.interchange.gguf import GgufModel, GgufType, Written, write_gguf
from slm.interchange.gguf.tokenizer import TokenType, from_gguf, to_gguf
from slm.interchange.importing import import_model

IDS = torch.arange(40)[None] * 7 % 320
FILE = Path("model.gguf")
TEXTS = ("Once upon a time, there was a fox.", " two  spaces\n\n and\ttabs ", "naïve 東京 🦊 don't", "", "12345 x1y2")


def write(checkpoint: Path, kind: GgufType = "f32") -> Written:
    return write_gguf(checkpoint, FILE, kind)


@torch.no_grad()
def test_float32_comes_back_as_it_was(shared_checkpoint: Path) -> None:
    written = write(shared_checkpoint)
    assert written.types == {"F32": 54}
    import_model(str(FILE), Path("back"))
    ours, back = load_checkpoint(shared_checkpoint), load_checkpoint(Path("back"))
    # Norms are stored with 1 added: what is below the last place of 1 + w is lost. The scale of attention is folded in.
    for name, tensor in ours.state_dict().items():
        if not name.endswith("q_norm.weight"):
            torch.testing.assert_close(back.state_dict()[name], tensor, atol=2**-23 if "norm" in name else 0, rtol=0)
    torch.testing.assert_close(back(IDS), ours(IDS), atol=3e-5, rtol=0)
    theirs, read = Tokenizer.load(Path("back")), Tokenizer.load(shared_checkpoint)
    for text in TEXTS:
        assert theirs.encode(text) == read.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    assert theirs.config["chat_template"] == read.config["chat_template"]


@pytest.mark.parametrize(("kind", "atol"), [("f16", 0.02), ("q8_0", 0.2)])
@torch.no_grad()
def test_smaller_types_come_back_nearly(shared_checkpoint: Path, kind: GgufType, atol: float) -> None:
    written = write(shared_checkpoint, kind)
    assert written.types == {"F32": 25, kind.upper(): 29}
    import_model(str(FILE), Path("back"))
    difference = (load_checkpoint(Path("back"))(IDS) - load_checkpoint(shared_checkpoint)(IDS)).abs().max()
    assert 0 < difference < atol


def test_blocks_of_small_weights(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of such a block is below the normal range of half precision, which rounds it coarsely."""
    model = make_model(config)
    product = model.model.layers[1].self_attn.q_proj.weight.data
    product *= 2e-3 / product.abs().max()
    save_checkpoint(Path("c"), model, tokenizer, {})
    assert write(Path("c"), "q8_0").largest_difference > 0.5 / 127 + 2**-11
    # Negative control: an error of 1 % of a block's largest weight is found.
    read = GgufModel.read
    monkeypatch.setattr(GgufModel, "read", lambda file, name: read(file, name) * (1.01 if "q_proj" in name else 1))
    with pytest.raises(SlmError, match=r"q_proj.weight differs by 0\.01"):
        write(Path("c"), "q8_0")


def test_rows_that_do_not_divide_are_half_precision(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    narrow = config.model_copy(update={"intermediate_size": 72})
    save_checkpoint(Path("c"), make_model(narrow), tokenizer, {})
    assert write(Path("c"), "q8_0").types == {"F16": 4, "F32": 25, "Q8_0": 25}


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "every sixth": {"num_hidden_layers": 6, "layer_types": (SLIDING,) * 5 + (FULL,)},
    "all global": {"layer_types": (FULL,) * 4},
    "all sliding": {"layer_types": (SLIDING,) * 4},
    "stretched": {
        "rope_parameters": {
            SLIDING: RopeParameters(rope_theta=100.0),
            FULL: RopeParameters(rope_theta=1e6, rope_type="linear", factor=8.0),
        }
    },
    "plain scale": {"query_pre_attn_scalar": 32},
    "one stop": {"eos_token_id": 0},
    "padded vocabulary": {"vocab_size": 384},
    "no period": {"layer_types": (FULL, SLIDING, FULL, FULL)},
    "other numbers": {
        "rms_norm_eps": 1.23456789e-5,
        "rope_parameters": {
            SLIDING: RopeParameters(rope_theta=123.456789012),
            FULL: RopeParameters(rope_theta=12345.678901234),
        },
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_configuration_comes_back(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, variant: str
) -> None:
    changed = config.model_copy(update=VARIANTS[variant])
    model = make_model(changed)
    save_checkpoint(Path("c"), model, tokenizer, {})
    write(Path("c"))
    import_model(str(FILE), Path("back"))
    torch.testing.assert_close(load_checkpoint(Path("back"))(IDS), model(IDS), atol=3e-5, rtol=0)
    back = read_config(Path("back"))
    assert back.layer_types == changed.layer_types
    # With a chat template the end of a turn ends a text as well.
    assert back.stop_token_ids == (0, 2) and set(changed.stop_token_ids) <= {0, 2}


def test_another_activation_is_refused(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer
) -> None:
    save_checkpoint(Path("c"), make_model(config.model_copy(update={"hidden_activation": "silu"})), tokenizer, {})
    with pytest.raises(SlmError, match="no activation 'silu'"):
        write(Path("c"))
    assert not FILE.exists()


@pytest.mark.parametrize("what", ["tensor", "setting", "stop", "token"])
def test_a_file_that_is_not_the_checkpoint_does_not_appear(
    shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "tensor":
        data = GGUFWriter.write_tensor_data
        monkeypatch.setattr(
            GGUFWriter, "write_tensor_data", lambda self, t, **k: data(self, t * np.float32(1.001), **k)
        )
    elif what == "setting":
        add = GGUFWriter.add_sliding_window
        monkeypatch.setattr(GGUFWriter, "add_sliding_window", lambda self, n: add(self, n + 1))
    elif what == "stop":
        monkeypatch.setattr(
            GGUFWriter, "add_eos_token_id", lambda self, n: self.add_uint32("tokenizer.ggml.eos_token_id", 77)
        )
    else:
        original = to_gguf
        monkeypatch.setattr(
            "slm.interchange.gguf.write.to_gguf", lambda t, n: (f := original(t, n)) | {"merges": f["merges"][5:]}
        )
    with pytest.raises(SlmError, match="GGUF file"):
        write(shared_checkpoint)
    assert list(Path.cwd().iterdir()) == []


def rewrite(path: Path, architecture: str = "gemma3", drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Writes the file anew with some fields and tensors changed."""
    reader = GGUFReader(path)
    writer = GGUFWriter(path.with_suffix(".new"), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        value = changes.pop(name, field.contents())
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value in changes.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            array = changes.get(tensor.name, tensor.data)
            writer.add_tensor(tensor.name, np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def norm_with_nan() -> np.ndarray:
    values = np.ones(64, np.float32)
    values[3] = np.nan
    return values


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another architecture": (lambda p: rewrite(p, "llama"), "general.architecture is 'llama', not 'gemma3'"),
    "truncated": (spoil, "cannot read the GGUF file"),
    "only a magic": (lambda p: p.write_bytes(b"GGUF"), "cannot read the GGUF file"),
    "another version": (
        lambda p: p.write_bytes(b"GGUF" + bytes([9, 0, 0, 0]) + bytes(64)),
        "cannot read the GGUF file",
    ),
    "a tensor missing": (lambda p: rewrite(p, drop=("blk.2.ffn_up.weight",)), "missing: model.layers.2.mlp.up_proj"),
    "no embedding": (lambda p: rewrite(p, drop=("token_embd.weight",)), "token_embd.weight is missing"),
    "not a number": (
        lambda p: rewrite(p, **{"output_norm.weight": norm_with_nan()}),
        "output_norm.weight has values that are NaN or infinite .1.",
    ),
    "a setting missing": (lambda p: rewrite(p, drop=("gemma3.block_count",)), "setting gemma3.block_count is missing"),
    "soft-capping": (lambda p: rewrite(p, **{"gemma3.final_logit_softcapping": 30.0}), "final_logit_softcapping"),
    "a part of several": (lambda p: rewrite(p, **{"split.count": 3}), "one of several files"),
    "an endless number of layers": (lambda p: rewrite(p, **{"gemma3.block_count": 2**31}), "gemma3.block_count is"),
    "no heads": (lambda p: rewrite(p, **{"gemma3.attention.head_count": 0}), "impossible value"),
    "an infinite epsilon": (
        lambda p: rewrite(p, **{"gemma3.attention.layer_norm_rms_epsilon": float("inf")}),
        "rms_norm_eps",
    ),
    "a part of the rotation": (lambda p: rewrite(p, **{"gemma3.rope.dimension_count": 16}), "rope.dimension_count"),
    "a merge of nothing": (lambda p: rewrite(p, **{"tokenizer.ggml.merges": ["zz yy"]}), "tokenizer is damaged"),
    "too few layers": (lambda p: rewrite(p, **{"gemma3.block_count": 3}), "unknown: blk.3.attn_k.weight"),
    "an unknown tokenizer": (lambda p: rewrite(p, **{"tokenizer.ggml.model": "bert"}), "tokenizer is 'bert'"),
    "an unknown pre-tokenizer": (lambda p: rewrite(p, **{"tokenizer.ggml.pre": "qwen2"}), "pre-tokenizer 'qwen2'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_name(shared_checkpoint: Path, slm: Callable[..., Any], what: str) -> None:
    write(shared_checkpoint)
    damage, said = BROKEN[what]
    damage(FILE)
    with pytest.raises(SlmError, match=said) as caught:
        import_model(str(FILE), Path("out"))
    assert "\n" not in caught.value.message
    result = slm("import", FILE, "--out", "out")
    assert (result.code, Path("out").exists()) == (1, False)
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q6_K", "Q4_K", "BF16"])
@torch.no_grad()
def test_quantized_types_are_read(shared_checkpoint: Path, kind: str) -> None:
    """Against the gguf package's own arithmetic; K-quants, which it cannot write, from random bytes."""
    write(shared_checkpoint)
    stored = GGMLQuantizationType[kind]
    reader, name = GGUFReader(FILE), "blk.0.attn_q.weight"
    values = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    block, size = gguf.GGML_QUANT_SIZES[stored]
    if kind.endswith("K"):
        packed = np.random.default_rng(0).integers(0, 60, (128, 256 // block * size), np.uint8)
    else:
        packed = gguf.quants.quantize(values, stored)
    writer = GGUFWriter("other.gguf", "gemma3")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            last = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], last)
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, packed, raw_dtype=stored)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GgufModel(Path("other.gguf"))
    read = model.read("model.layers.0.self_attn.q_proj.weight")
    assert model.types[kind] == 1 and read.shape == (128, 256)
    np.testing.assert_array_equal(read, gguf.quants.dequantize(packed, stored))
    if not kind.endswith("K"):
        assert np.abs(read - values).max() < 0.5


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_head_beside_the_embedding(
    config: ModelConfig, make_model: Callable[..., CausalLM], tokenizer: Tokenizer, tied: bool
) -> None:
    """Some converters write the embedding twice: that is a tied head. Another matrix is a head of its own, as in llama.cpp."""
    model = make_model(config.model_copy(update={"tie_word_embeddings": False}))
    if tied:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    save_checkpoint(Path("c"), model, tokenizer, {})
    assert write(Path("c")).types["F32"] == 55
    done = import_model(str(FILE), Path("back"))
    assert read_config(Path("back")).tie_word_embeddings == tied
    assert sum(done.stored_as.values()) == (54 if tied else 55)
    torch.testing.assert_close(load_checkpoint(Path("back"))(IDS), load_checkpoint(Path("c"))(IDS), atol=3e-5, rtol=0)


def test_a_vocabulary_of_another_size_than_the_embedding(shared_checkpoint: Path) -> None:
    write(shared_checkpoint)
    rewrite(FILE, **{"gemma3.vocab_size": 321})
    with pytest.raises(SlmError, match=r"gemma3\.vocab_size is 321, and token_embd\.weight has 320 rows"):
        import_model(str(FILE), Path("back"))


@pytest.mark.parametrize(
    ("one", "other"), [(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"), (b"ggml.bos_token_id", b"ggml.eos_token_id")]
)
def test_a_key_or_a_tensor_twice(shared_checkpoint: Path, one: bytes, other: bytes) -> None:
    write(shared_checkpoint)
    content = FILE.read_bytes()
    assert one in content and other in content
    FILE.write_bytes(content.replace(one, other))
    with pytest.raises(SlmError, match=r"cannot read the GGUF file.*[Dd]uplicate"):
        import_model(str(FILE), Path("back"))


def sentencepiece() -> Tokenizer:
    """A small vocabulary of SentencePiece's kind: merges by rank, runs of spaces by the user, bytes for the rest."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "a", "b", "c", "n", "\n", "ab", "▁a", "abc", "▁ab", "bc", "▁abc", "cab"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁▁", "▁▁▁", *bytes_, *words])}
    merges = [("▁▁", "▁"), ("▁", "▁▁"), ("▁", "▁"), ("a", "b"), ("▁", "a"), ("ab", "c"), ("a", "bc"), ("▁a", "b")]
    merges += [("▁", "ab"), ("b", "c"), ("▁ab", "c"), ("▁a", "bc"), ("▁", "abc"), ("c", "ab")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    from tokenizers import AddedToken, decoders, processors

    backend.add_tokens([AddedToken(token, normalized=False) for token in ("▁▁", "▁▁▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return Tokenizer(backend, {})


def test_sentencepiece_there_and_back() -> None:
    tokenizer = sentencepiece()
    written = to_gguf(tokenizer, tokenizer.vocab_size)
    assert (written["model"], written["add_bos_token"], written["add_space_prefix"]) == ("llama", True, False)
    assert written["tokens"][4:6] == ["  ", "   "]  # as llama.cpp looks for them, before it escapes spaces
    assert written["token_type"][:7] == [3, 3, 3, 3, 4, 4, TokenType.BYTE]
    ranks = {
        t: s for t, s, k in zip(written["tokens"], written["scores"], written["token_type"], strict=True) if k == 1
    }
    assert ranks["ab"] > ranks["▁a"] > ranks["abc"] > ranks["▁ab"] > ranks["bc"] > ranks["▁abc"] > ranks["cab"]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in written.items() if value is not None}
    back = from_gguf(metadata | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}, FILE, 64)
    assert (
        json.loads(back.backend.to_str())["model"]["vocab"] == json.loads(tokenizer.backend.to_str())["model"]["vocab"]
    )
    for text in ("abc cab  abc", "a   b\n c", "xyz é", " ab", "", "cabc bcab"):
        assert back.encode(text) == tokenizer.encode(text), text
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_gpt2s_own_vocabulary_there_and_back(gpt2_vocabulary: None) -> None:
    from slm.train.data.tokenizer import gpt2

    tokenizer = gpt2(max_length=64)
    written = to_gguf(tokenizer, 50_304)
    assert (written["model"], written["pre"], len(written["tokens"])) == ("gpt2", "gpt-2", 50_304)
    assert written["tokens"][-1] == "[PAD50303]" and written["token_type"][-1] == TokenType.UNUSED
    metadata = {f"tokenizer.ggml.{key}": value for key, value in written.items()}
    back = from_gguf(metadata | {"tokenizer.ggml.bos_token_id": 50_256}, FILE, 64)
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tokenizer: Tokenizer) -> None:
    for change, said in (
        ({"normalizer": {"type": "Lowercase"}}, "splits or normalizes"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits or normalizes"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
    ):
        backend = Backend.from_str(json.dumps(json.loads(tokenizer.backend.to_str()) | change))
        with pytest.raises(SlmError, match=said):
            to_gguf(Tokenizer(backend, {}), 320)


def test_somebody_elses_file_is_kept(shared_checkpoint: Path) -> None:
    FILE.write_text("mine")
    with pytest.raises(SlmError, match="exists and is not a GGUF file"):
        write(shared_checkpoint)
    assert FILE.read_text() == "mine"


def test_the_command(shared_checkpoint: Path, slm: Callable[..., Any]) -> None:
    assert slm("export", "--gguf", shared_checkpoint, "--out", "new").code == 0
    assert [file.name for file in Path("new").iterdir()] == ["random-f16.gguf"]
    assert "slm import" in slm("generate", "new/random-f16.gguf", "-p", "x").err
    assert "slm import" in slm("export", "--onnx", "new/random-f16.gguf").err
    assert "slm import" in slm("info", "new/random-f16.gguf").err
    assert slm("export", "--gguf", "missing").err.startswith("error: not found: missing\n")
    result = slm("export", "--gguf", shared_checkpoint, "--gguf-type", "q8_0", "--out", "x.gguf", "--json")
    shown = json.loads(result.out)
    assert (result.code, shown["gguf"], shown["types"]) == (0, "x.gguf", {"F32": 25, "Q8_0": 29})
    assert shown["bytes"] == Path("x.gguf").stat().st_size
    assert slm("export", shared_checkpoint).code == 2
    assert slm("export", "--gguf", "--onnx", shared_checkpoint).code == 2
    assert slm("export", "--gguf", "--context", 64, shared_checkpoint).code == 2
    assert slm("export", "--onnx", "--gguf-type", "f16", shared_checkpoint).code == 2


def test_no_length_is_believed(shared_checkpoint: Path) -> None:
    """Every length and count in the metadata and the list of tensors, made huge: a refusal at once, whatever it is of."""
    write(shared_checkpoint)
    whole = FILE.read_bytes()
    reader = GGUFReader(FILE)
    places = {8, 16}  # how many tensors and fields
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        places.add(field.offset)
        if field.types[0] in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            value = field.offset + 8 + len(field.name.encode()) + 4
            places.add(value + 4 if field.types[0] == gguf.GGUFValueType.ARRAY else value)
    places |= {tensor.field.offset for tensor in reader.tensors}
    del reader
    for place in sorted(places):
        for length in (2**60, 2**31, len(whole)):
            FILE.write_bytes(whole[:place] + length.to_bytes(8, "little") + whole[place + 8 :])
            with pytest.raises(SlmError, match="cannot read the GGUF file"):
                GgufModel(FILE)


def test_cut_anywhere_it_is_refused(shared_checkpoint: Path) -> None:
    write(shared_checkpoint)
    whole = FILE.read_bytes()
    for end in [*range(1, 2000, 97), *range(2000, len(whole) - 1, len(whole) // 40)]:
        FILE.write_bytes(whole[:end])
        with pytest.raises(SlmError):
            import_model(str(FILE), Path("out"))
    assert not Path("out").exists()


def test_a_factor_alone_stretches_linearly(shared_checkpoint: Path) -> None:
    """As llama.cpp takes it."""
    write(shared_checkpoint)
    rewrite(FILE, **{"gemma3.rope.scaling.factor": 8.0})
    rope = GgufModel(FILE).config.rope_parameters[FULL]
    assert (rope.rope_type, rope.factor) == ("linear", 8.0)
