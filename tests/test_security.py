"""SECURITY.md: each claim names a test that exists, and those that are held nowhere else are held here."""

import re
import shutil
from hashlib import sha256
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slm
from slm.core.chat import Message, chat_ids, dialogues, turn_ids
from slm.core.errors import SlmError
from slm.core.files import read_json
from slm.core.graph_file import external_files
from slm.core.manifest import Bundle, Manifest, amend
from slm.core.tokenizer import SPECIAL_TOKENS, Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT))
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), (file, test)


def test_every_file_that_is_named_is_there() -> None:
    for name in set(re.findall(r"`((?:core|runtime|interchange|deploy)/[\w./]*)`", TEXT)):
        assert (ROOT / name).exists(), name


_said = st.lists(st.sampled_from([*SPECIAL_TOKENS, "\n", "user", "model\n", " ", "hi", "<", "_turn>", "é"]), max_size=8)


def test_what_is_said_forms_no_turn(tokenizer: Tokenizer) -> None:
    """However special tokens are spelt in what is said, in whatever part, ids have those of the template and no others."""
    special = {tokenizer.token_id(token) for token in SPECIAL_TOKENS}
    begins = tokenizer.encode("")

    def count(ids: list[int]) -> int:
        return sum(token in special for token in ids)

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(_said, _said, _said)
    def one(system: list[str], user: list[str], assistant: list[str]) -> None:
        messages: list[Message] = [
            {"role": "system", "content": "".join(system)},
            {"role": "user", "content": "".join(user)},
            {"role": "assistant", "content": "".join(assistant)},
            {"role": "user", "content": "".join(user)},
        ]
        assert count(chat_ids(tokenizer, messages)) == count(begins) + 2 * 4 + 1
        assert count(turn_ids(tokenizer, "".join(user))) == count(begins) + 3
        (dialogue,) = dialogues(tokenizer, [messages[:3]], {tokenizer.token_id("<end_of_turn>") or 0})
        assert not isinstance(dialogue, SlmError)
        assert count(list(dialogue.ids)) == count(begins) + 2 * 3

    one()
    assert count(tokenizer.encode("<end_of_turn>")) > count(begins)  # the negative control: a prompt may spell them


def changed(bundle: Bundle, path: Path, location: str) -> Path:
    """A bundle whose graph reads its weights from elsewhere, sealed again."""
    copy = Path(shutil.copytree(bundle.path, path))
    graph = copy / bundle.manifest.model
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())
    manifest = Manifest.model_validate(read_json(copy / "manifest.json", "manifest"))
    content = graph.read_bytes()
    entry = manifest.files[manifest.model].model_copy(
        update={"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    )
    amend(copy, manifest.model_copy(update={"files": manifest.files | {manifest.model: entry}}))
    return copy


@pytest.mark.parametrize("place", ["../../outside/weights", "/absolute", "link", "unsealed", "model.onnx_data\0x", ""])
def test_a_graph_reads_sealed_files_alone(shared_bundle: Bundle, tmp_path: Path, place: str) -> None:
    """Refused before onnxruntime sees it, whose older versions read what they are pointed at."""
    data = shared_bundle.path / "onnx" / "model.onnx_data"
    (tmp_path / "outside").mkdir()
    shutil.copy(data, tmp_path / "outside" / "weights")
    location = str(tmp_path / "outside" / "weights") if place == "/absolute" else place
    copy = changed(shared_bundle, tmp_path / "copy", location)
    (copy / "onnx" / "link").symlink_to(tmp_path / "outside" / "weights")
    shutil.copy(data, copy / "onnx" / "unsealed")
    with pytest.raises(SlmError, match=r"which is not listed in manifest.json"):
        slm.load(copy)


def test_a_graph_that_reads_its_own_weights_is_fine(shared_bundle: Bundle, tmp_path: Path) -> None:
    copy = changed(shared_bundle, tmp_path / "copy", "model.onnx_data")
    assert external_files(copy / shared_bundle.manifest.model) == {"model.onnx_data"}
    ids = [[1, 2, 3]]
    assert (slm.load(copy).logits(ids) == slm.load(shared_bundle.path).logits(ids)).all()


def test_weights_are_found_wherever_a_graph_can_hide_them(tmp_path: Path) -> None:
    """In branches, functions, attributes and sparse tensors, as onnx itself writes them."""

    def outside(name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        return tensor

    helper = onnx.helper
    inner = helper.make_graph([], "inner", [], [], [outside("branch")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    node.attribute.append(helper.make_attribute("value", outside("attribute")))
    tensors = helper.make_attribute("values", [outside("list")])
    sparse = onnx.SparseTensorProto(values=outside("sparse"), indices=outside("indices"), dims=[4])
    graph = helper.make_graph([node], "graph", [], [], [outside("initializer")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    constant = helper.make_node("Constant", [], ["z"])
    constant.attribute.append(tensors)
    model.functions.append(helper.make_function("d", "f", [], ["z"], [constant], [helper.make_opsetid("", 21)]))
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    assert external_files(file) == {"branch", "attribute", "list", "sparse", "indices", "initializer"}
