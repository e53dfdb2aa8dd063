"""`slm import` of Hugging Face directories: every spelling and arrangement, and refusals that name the culprit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from slm.core.checkpoint import notices_of, read_config, read_info, tensor_shapes
from slm.core.config import FULL, ModelConfig
from slm.core.errors import SlmError
from slm.core.nn import CausalLM, load_checkpoint
from slm.core.progress import Silent
from slm.core.tokenizer import Tokenizer
from slm.core.weights import weights_sha256
from slm.finetune.combine import Combination, combine
from slm.interchange.importing import import_model

IDS = torch.arange(40)[None] * 7 % 320
OUT = Path("imported")


@pytest.fixture
def theirs(shared_checkpoint: Path) -> transformers.Gemma3ForCausalLM:
    """transformers' model with the shared checkpoint's weights."""
    return transformers.Gemma3ForCausalLM.from_pretrained(shared_checkpoint)


@pytest.fixture
def directory(shared_checkpoint: Path, theirs: transformers.Gemma3ForCausalLM, tmp_path: Path) -> Path:
    """A directory that transformers saved."""
    theirs.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_checkpoint / name, tmp_path / "hf" / name)
    return tmp_path / "hf"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_the_shapes_are_the_models(config: ModelConfig) -> None:
    for tied in (True, False):
        shape = config.model_copy(update={"tie_word_embeddings": tied})
        model = CausalLM(shape)
        assert tensor_shapes(shape) == {name: tuple(p.shape) for name, p in model.named_parameters()}


@torch.no_grad()
def test_a_directory_of_transformers(directory: Path, theirs: transformers.Gemma3ForCausalLM) -> None:
    done = import_model(str(directory), OUT)
    assert (done.kind, done.dtype, done.notices) == ("huggingface", "float32", ())
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(OUT)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=0, rtol=0)
    assert read_info(OUT)["imported"]["sha256"] == weights_sha256(directory)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@torch.no_grad()
def test_a_float_type_is_kept(directory: Path, theirs: transformers.Gemma3ForCausalLM, stored: str) -> None:
    theirs.to(getattr(torch, stored)).save_pretrained(directory)
    assert import_model(str(directory), OUT).dtype == stored
    assert json.loads((OUT / "config.json").read_text())["dtype"] == stored
    kept, original = (safetensors.torch.load_file(path / "model.safetensors") for path in (OUT, directory))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.items())
    wide = transformers.AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.float32)
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), wide(IDS).logits, atol=3e-5, rtol=0)


def test_a_float_type_is_chosen(directory: Path) -> None:
    assert import_model(str(directory), OUT, "bfloat16").dtype == "bfloat16"
    kept, original = (safetensors.torch.load_file(path / "model.safetensors") for path in (OUT, directory))
    assert all(torch.equal(kept[name], tensor.bfloat16()) for name, tensor in original.items())


@torch.no_grad()
def test_several_files_behind_an_index(directory: Path, theirs: transformers.Gemma3ForCausalLM) -> None:
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="100kB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    # Used as it is, and imported into one file.
    torch.testing.assert_close(load_checkpoint(directory)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    import_model(str(directory), OUT)
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    missing = sorted(directory.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(SlmError, match=f"{missing.name} is missing"):
        import_model(str(directory), Path("other"))
    assert not Path("other").exists()


@torch.no_grad()
def test_the_layout_of_the_hubs_cache(directory: Path, theirs: transformers.Gemma3ForCausalLM) -> None:
    """Files are links out of the snapshot, several safetensors among them."""
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="100kB")
    snapshot, blobs = Path("models--a--b/snapshots/0f"), Path("models--a--b/blobs")
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for i, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:040x}")
    import_model(str(snapshot), OUT)
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)


def test_an_index_leads_nowhere_else(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SlmError, match="leads out of the directory"):
        import_model(str(directory), OUT)


@pytest.mark.parametrize("layout", ["published", "transformers"])
@torch.no_grad()
def test_the_text_part_of_a_multimodal_model(
    directory: Path, theirs: transformers.Gemma3ForCausalLM, layout: str
) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.Gemma3Config(
        text_config=theirs.config.to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        eos_token_id=[0, 1],
    )
    model = transformers.Gemma3ForConditionalGeneration(whole)
    model.model.language_model.load_state_dict(theirs.model.state_dict())
    shutil.rmtree(directory / "x", ignore_errors=True)
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink(missing_ok=True)
    if layout == "transformers":
        state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    else:
        state = {
            n.replace("model.language_model.", "language_model.model.")
            .replace("model.vision", "vision")
            .replace("model.multi", "multi"): t
            for n, t in model.state_dict().items()
            if n != "lm_head.weight"
        }
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(whole.to_diff_dict()))
    import_model(str(directory), OUT)
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    assert read_config(OUT).eos_token_id == (0, 1)


@torch.no_grad()
def test_stretched_positions_in_the_old_spelling(directory: Path) -> None:
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("rope_parameters")
    old = {
        "rope_theta": 10_000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    (directory / "config.json").write_text(json.dumps(fields | old))
    import_model(str(directory), OUT)
    assert read_config(OUT).rope_parameters[FULL].factor == 8
    again = transformers.AutoModelForCausalLM.from_pretrained(OUT)
    ids = IDS.repeat(1, 4)
    torch.testing.assert_close(load_checkpoint(OUT)(ids), again(ids).logits, atol=3e-5, rtol=0)


def test_tables_of_the_rotary_embedding_are_not_read(directory: Path) -> None:
    """Some programs write them; they follow from the configuration."""
    plain = import_model(str(directory), directory.parent / "plain")
    tables = {f"model.{name}.inv_freq": np.ones(16, np.float32) for name in ("rotary_emb", "rotary_emb_local")}
    retensor(directory, lambda tensors: tensors.update(tables))
    imported = import_model(str(directory), directory.parent / "imported")
    assert (imported.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()


def test_what_ends_a_text_is_what_generation_says(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "top_k": 64}))
    edit(directory / "config.json", eos_token_id=0)
    import_model(str(directory), OUT)
    assert read_config(OUT).eos_token_id == (0, 2)
    assert json.loads((OUT / "generation_config.json").read_text())["top_k"] == 64


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


NAME = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "cannot read the weights: .*model.safetensors"),
    "a tensor missing": (lambda p: retensor(p, lambda t: t.pop(NAME)), f"missing: {NAME}"),
    "a tensor too many": (
        lambda p: retensor(p, lambda t: t.update({"model.extra.weight": np.ones(2, np.float32)})),
        "unknown: model.extra.weight",
    ),
    "a wrong shape": (
        lambda p: retensor(p, lambda t: t.update({NAME: np.ones((2, 3), np.float32)})),
        f"wrong shape: {NAME} \\(2, 3\\) instead of \\(96, 64\\)",
    ),
    "not a number": (
        lambda p: retensor(p, lambda t: t[NAME].__setitem__((0, 0), np.nan)),
        f"{NAME} has .*infinite .1.",
    ),
    "infinite weights": (
        lambda p: retensor(p, lambda t: t[NAME].__setitem__(0, np.inf)),
        f"{NAME} has .*infinite .64.",
    ),
    "integers": (
        lambda p: retensor(p, lambda t: t.update({NAME: np.ones((96, 64), np.int8)})),
        f"{NAME} is stored as I8",
    ),
    "a pattern of text": (
        lambda p: edit(p / "config.json", layer_types=None, sliding_window_pattern="6"),
        "sliding_window_pattern='6'",
    ),
    "scaling of text": (lambda p: edit(p / "config.json", rope_scaling="linear"), "rope_scaling='linear'"),
    "two scalings": (
        lambda p: edit(p / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}),
        "contradicts itself",
    ),
    "endless layers": (
        lambda p: edit(p / "config.json", num_hidden_layers=10**12, layer_types=None),
        "num_hidden_layers",
    ),
    "endless nesting": (
        lambda p: (p / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
        "config.json cannot be read",
    ),
    "an infinite epsilon": (lambda p: edit(p / "config.json", rms_norm_eps=float("inf")), "rms_norm_eps"),
    "an unknown kind of attention": (lambda p: edit(p / "config.json", attention_sinks=1), "attention_sinks"),
    "another architecture": (lambda p: edit(p / "config.json", model_type="llama"), "'llama'"),
    "no text part": (lambda p: edit(p / "config.json", model_type="gemma3"), "no text_config"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no configuration": (lambda p: (p / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_name(directory: Path, slm: Callable[..., Any], what: str) -> None:
    damage, said = BROKEN[what]
    damage(directory)
    with pytest.raises(SlmError, match=said) as caught:
        import_model(str(directory), OUT)
    result = slm("import", directory, "--out", OUT)
    assert (result.code, OUT.exists()) == (1, False)
    if what == "truncated":  # which `slm info` must not count as if it were whole
        said_by_info = slm("info", directory)
        assert said_by_info.code == 1 and "cannot read the weights" in said_by_info.err
    assert result.err.splitlines()[-1 - bool(caught.value.hint)] == f"error: {caught.value.message}"


def test_too_large_for_half_precision(directory: Path) -> None:
    retensor(directory, lambda tensors: tensors[NAME].__setitem__((3, 3), 7e4))
    with pytest.raises(SlmError, match=f"{NAME} as float16 has values that are NaN or infinite .1."):
        import_model(str(directory), OUT, "float16")


def test_the_command_chains(directory: Path, slm: Callable[..., Any]) -> None:
    result = slm("import", directory, "--json")
    shown = json.loads(result.out)
    assert (result.code, shown["checkpoint"]) == (0, "runs/hf/checkpoint/imported")
    assert shown["stored_as"] == {"float32": 54}
    exported = slm("export", "--onnx", "--json")
    assert exported.code == 0 and "runs/hf/checkpoint/imported" in exported.err
    assert Path("runs/hf/onnx/manifest.json").is_file()


def test_a_token_that_the_model_has_no_row_for(directory: Path, slm: Callable[..., Any]) -> None:
    """As in Gemma's own tokenizer, whose token for pictures lies beyond the text model's rows."""
    document = json.loads((directory / "tokenizer.json").read_text())
    beyond = dict(document["added_tokens"][0], id=320, content="<picture>")
    document["added_tokens"].append(beyond)
    (directory / "tokenizer.json").write_text(json.dumps(document))
    assert slm("import", directory, "--out", OUT).code == 0
    result = slm("generate", OUT, "-p", "see <picture> here")
    assert result.code == 1 and "token id 320" in result.err
    assert slm("generate", OUT, "-p", "see here", "--max-new-tokens", 2).code == 0


def test_other_sources_get_runs_of_their_own(directory: Path, slm: Callable[..., Any]) -> None:
    other = Path(shutil.copytree(directory, "elsewhere/hf"))
    made = [json.loads(slm("import", source, "--json").out)["checkpoint"] for source in (directory, other, directory)]
    assert made == [f"runs/{run}/checkpoint/imported" for run in ("hf", "hf-2", "hf")]


def test_what_was_imported_last_answers_although_it_is_not_exported(directory: Path, slm: Callable[..., Any]) -> None:
    ask = ("generate", "-p", "x", "--max-new-tokens", 1)
    assert slm("import", directory).code == 0 and slm("export", "--onnx").code == 0
    assert "Using runs/hf/onnx (newest bundle)." in slm(*ask).err
    assert slm("import", Path(shutil.copytree(directory, "newer"))).code == 0
    assert "Using runs/newer/checkpoint/imported with PyTorch" in slm(*ask).err
    for command in ("quantize", "--int8"), ("serve", "--port", 0), ("web", "--port", 0):
        result = slm(*command)
        assert result.code == 1 and "slm export --onnx runs/newer/checkpoint/imported" in result.err


def test_a_directory_used_as_it_is_ends_where_an_imported_one_does(directory: Path, slm: Callable[..., Any]) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    edit(directory / "config.json", eos_token_id=0)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert read_config(directory).eos_token_id == (0, 2)
    assert slm("export", "--onnx", directory, "--out", "bundle").code == 0
    assert json.loads(Path("bundle/config.json").read_text())["eos_token_id"] == [0, 2]
    assert Tokenizer.load(Path("bundle")).config["chat_template"] == "{{ messages[0].content }}!"


def test_a_source_is_kept(directory: Path) -> None:
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(SlmError, match="is the source itself"):
        import_model(str(directory), directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_one_of_ours_keeps_its_story(shared_checkpoint: Path) -> None:
    import_model(str(shared_checkpoint), OUT)
    assert read_info(OUT)["made_by"] == "slm import"
    assert notices_of(OUT) == ()
    assert Tokenizer.load(OUT).sha256 == Tokenizer.load(shared_checkpoint).sha256


def keep_notes(directory: Path, out: Path = OUT) -> list[str]:
    """Imports a directory and returns what was said."""
    said: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    import_model(str(directory), out, progress=Listener())
    return said


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def add_head(tensors: dict[str, np.ndarray], scale: float) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + np.float32(scale) * np.roll(tensors[EMBEDDING], 1, axis=0)


@torch.no_grad()
def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(directory: Path, slm: Callable[..., Any]) -> None:
    """transformers 5 does not tie two matrices that differ; 4.57 does, and its logits are others."""
    retensor(directory, lambda tensors: add_head(tensors, 0.3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert any("ties the head to the embedding" in note for note in keep_notes(directory))
    assert not read_config(OUT).tie_word_embeddings
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(OUT)
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=0, rtol=0)
    # Used as it is, the directory is refused by name, and the hint says what to do.
    for command in (("export", "--onnx"), ("export", "--gguf"), ("info",)):
        result = slm(*command, directory)
        assert result.code == (0 if command == ("info",) else 1)
        assert command == ("info",) or ("lm_head.weight has other values" in result.err and "slm import" in result.err)
    with pytest.raises(SlmError, match="has other values"):
        combine([directory, directory], Path("mean"), Combination("linear", (1, 1)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_head_that_is_the_embedding_stays_tied(directory: Path, stored: str) -> None:
    """Whatever types the two are stored in: values count, not bytes."""

    def both(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16).astype(np.float32)
        tensors[HEAD] = tensors[EMBEDDING].astype(stored)

    retensor(directory, both)
    assert not any("ties" in note for note in keep_notes(directory))
    assert read_config(OUT).tie_word_embeddings
    assert HEAD not in safetensors.numpy.load_file(OUT / "model.safetensors")
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), load_checkpoint(directory)(IDS), atol=0, rtol=0)


@torch.no_grad()
def test_a_head_without_an_embedding_is_the_embedding_where_both_are_tied(directory: Path) -> None:
    retensor(directory, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert any("the weights hold the head and no embedding" in note for note in keep_notes(directory))
    torch.testing.assert_close(load_checkpoint(OUT)(IDS), theirs(IDS).logits, atol=3e-5, rtol=0)


def test_no_head_where_the_configuration_asks_for_one(directory: Path) -> None:
    """transformers would draw one at random."""
    edit(directory / "config.json", tie_word_embeddings=False)
    with pytest.raises(SlmError, match=f"missing: {HEAD}") as caught:
        import_model(str(directory), OUT)
    assert "tie_word_embeddings" in str(caught.value.hint)


def shards(directory: Path, second: dict[str, np.ndarray]) -> None:
    """Two files behind an index, the second with tensors of its own."""
    whole = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": whole, "model-00002-of-00002.safetensors": second}
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, directory / name, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_two_files_with_different_tensors_of_one_name(directory: Path) -> None:
    norm = safetensors.numpy.load_file(directory / "model.safetensors")["model.norm.weight"]
    other = Path(shutil.copytree(directory, "other"))
    shards(directory, {"model.norm.weight": norm + 1})
    with pytest.raises(SlmError, match=r"two files contain different tensors named model\.norm\.weight"):
        import_model(str(directory), OUT)
    shards(other, {"model.norm.weight": norm})
    import_model(str(other), OUT)


def test_a_pickle_beside_no_weights_is_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(SlmError, match="no weights") as caught:
        import_model(str(directory), OUT)
    assert "pickle files" in str(caught.value.hint)


def test_statements_that_differ_are_said_and_one_is_followed(directory: Path) -> None:
    edit(
        directory / "config.json",
        sliding_window_pattern=3,
        layer_types=["full_attention"] + ["sliding_attention"] * 3,
        dtype="bfloat16",
        unsloth_fixed=True,
        **{"\x1b[2Jx": 1},
        eos_token_id=0,
        bos_token_id=0,
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "bos_token_id": 1}))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (directory / "model.safetensors.index.json").write_text("{}")
    edit(directory / "tokenizer_config.json", bos_token="<old>")
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    said = "\n".join(keep_notes(directory))
    for part in (
        r"fields that change nothing: unsloth_fixed, '\x1b[2Jx'",
        "layer_types is followed; sliding_window_pattern=3",
        "eos_token_id: config.json says 0, generation_config.json [2]; generation_config.json is followed",
        "bos_token_id: config.json says 0, generation_config.json 1; config.json is followed",
        "config.json says dtype bfloat16; the weights are read as they are stored: float32",
        "model.safetensors is read; model.safetensors.index.json and its files are not",
        "chat_template.jinja is the chat template",
    ):
        assert part in said
    config = read_config(OUT)
    assert (config.layer_types[0], config.eos_token_id, config.bos_token_id) == (FULL, (2,), 0)
    tokenizer = Tokenizer.load(OUT)
    assert tokenizer.config["chat_template"] == "{{ messages[0].content }}!"
    # As transformers: the map wins over a tokenizer_config.json without added_tokens_decoder.
    assert tokenizer.config["bos_token"] == "<|endoftext|>"
    assert transformers.AutoTokenizer.from_pretrained(directory).bos_token == "<|endoftext|>"


def test_a_plain_directory_says_nothing_of_contradictions(directory: Path) -> None:
    assert len(keep_notes(directory)) == 1  # how many parameters
