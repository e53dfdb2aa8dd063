"""The page's own engine: its logits are those of onnxruntime for every kind of bundle that it reads, in Node."""

import base64
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from slm.core.config import FULL, SLIDING, ModelConfig
from slm.core.manifest import Bundle, seal
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.export.bundle import export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
from slm.runtime import shipped
from slm.runtime.decoder import OnnxDecoder
from slm.web.engine_plan import NotSupported, engine_plan
from slm.web.site import local_site

Node = Callable[..., Any]
Array = npt.NDArray[Any]

INT8 = Settings(gate=Gate(None), smooth=False, cache="float32")
INT4 = replace(INT8, precision="int4", method="nearest")
SETTINGS: dict[str, Settings | None] = {
    "float32": None,
    "int8": INT8,
    "int8 blocks of 16": replace(INT8, block_size=16),
    "int8 caches": replace(INT8, cache="int8"),
    "int8 dynamic": replace(INT8, dynamic=True),
    "int4 blocks of 16": replace(INT4, block_size=16),
    "int4 blocks of 32": replace(INT4, block_size=32),
    "int4 with frequent rows": replace(INT4, block_size=32, prefer="size"),
    "halves": replace(INT8, head="halves"),
}
# What the bundles are calibrated on.
TEXT = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))
# More than three windows of the model, and more than one piece of a prefill.
IDS = np.random.default_rng(5).integers(0, 320, 150).tolist()
# Limits of differences of logits up to 1.5. With 8-bit weights, the engine rounds activations to 16 bits, and onnxruntime at
# accuracy level 0 does not round them. A cached key between two 8-bit integers makes a larger difference.
EXACT, ROUNDED = 2e-3, 0.03
# Where onnxruntime rounds activations to 8 bits beside 8-bit weights: the difference that this makes.
COARSE = 0.2

# Module and threads. All have the same logits, bit for bit.
ENGINES = [("relaxed.wasm", 1), ("simd.wasm", 1), ("relaxed.wasm", 2), ("simd.wasm", 3)]

PROGRAM = """
import v8 from "node:v8";
v8.setFlagsFromString("--experimental-wasm-relaxed-simd");
await import(given.worker);
const { Engine } = await import("page/engine.js");
const data = fs.readFileSync(given.data);
const results = [];
for (const { module, threads } of given.engines) {
  let engine = null;
  const found = [];
  try {
    engine = new Engine(given.plan, data.length, threads);
    engine.data.set(data);
    await engine.start(new Uint8Array(fs.readFileSync(module)));
    for (const task of given.tasks) {
      if (task.reset) engine.reset();
      if (task.keep) engine.keep();
      if (task.resume) found.push(engine.resume(task.resume));
      for (const ids of task.steps ?? []) {
        const logits = new Float32Array(await engine.step(ids));
        found.push(Buffer.from(logits.buffer).toString("base64"));
      }
    }
    results.push({ found, bytes: engine.bytes, caches: engine.cacheBytes });
  } catch (error) {
    results.push({ message: error.message, hint: error.hint });
  }
  engine?.close();
}
console.log(JSON.stringify(results));
"""


@pytest.fixture(scope="session")
def made(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Returns a function that makes a bundle by its name in `SETTINGS`."""
    home, known = tmp_path_factory.mktemp("engine"), {"float32": shared_bundle}

    def make(name: str) -> Bundle:
        if name not in known:
            known[name] = quantize_bundle(shared_bundle, home / name, TEXT, SETTINGS[name])[0]
        return known[name]

    return make


class Runner:
    """Runs tasks with the engine in Node."""

    def __init__(self, in_node: Node) -> None:
        self._in_node = in_node

    def all(
        self, bundle: Bundle, tasks: Sequence[dict[str, Any]], engines: Sequence[tuple[str, int]], plan: Any = None
    ) -> list[dict[str, Any]]:
        """Runs the same tasks with several engines, given by module and threads."""
        plan = plan or engine_plan(bundle)
        given = {
            "plan": plan,
            "data": str(bundle.path / plan["data"]),
            "worker": (Path(__file__).parent / "node_worker.mjs").as_uri(),
            "engines": [{"module": str(STATIC / module), "threads": threads} for module, threads in engines],
            "tasks": list(tasks),
        }
        results: list[dict[str, Any]] = self._in_node(PROGRAM, given)
        for result in results:
            result["found"] = [
                np.frombuffer(base64.b64decode(each), np.float32) if isinstance(each, str) else each
                for each in result.get("found", ())
            ]
        return results

    def __call__(
        self, bundle: Bundle, *tasks: dict[str, Any], threads: int = 1, plan: Any = None, fails: bool = False
    ) -> Any:
        """Returns what one engine does: the logits of each step and the result of each `resume`, in `found`."""
        result = self.all(bundle, tasks, [("relaxed.wasm", threads)], plan)[0]
        assert ("message" in result) == fails, result
        return result


STATIC = Path(local_site.__code__.co_filename).parent / "static" / "engine"


@pytest.fixture
def run(in_node: Node) -> Runner:
    return Runner(in_node)


def pieces(ids: Sequence[int], *sizes: int) -> list[list[int]]:
    """Cuts ids into pieces; the last size repeats."""
    found, at, sizes_left = [], 0, list(sizes)
    while at < len(ids):
        size = sizes_left.pop(0) if len(sizes_left) > 1 else sizes_left[0]
        found.append(list(ids[at : at + size]))
        at += size
    return found


def native(bundle: Bundle, steps: Sequence[Sequence[int]], copy: Path | None = None) -> list[Array]:
    """Returns onnxruntime's logits after each step; with `copy`, those of products that do not round activations."""
    if copy is not None:
        shutil.copytree(bundle.path, copy)
        graph = onnx.load(copy / bundle.manifest.model, load_external_data=False)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        onnx.save(graph, copy / bundle.manifest.model)
        bundle = seal(copy, bundle.manifest)
    decoder = OnnxDecoder(bundle, threads=1)
    decoder.whole_head = False  # as steps of one token read a head in halves
    return [np.array(decoder.step(np.array([ids], np.int64))) for ids in steps]


def largest_difference(found: Sequence[Array], wanted: Sequence[Array], likely: int = 320) -> float:
    """Returns the largest difference of the logits of the likeliest tokens."""
    differences = []
    for a, b in zip(found, wanted, strict=True):
        row = b.reshape(-1)[-a.size :]
        among = np.argsort(row)[-likely:]
        differences.append(float(np.abs(a - row)[among].max()))
    return max(differences)


def mean_kl(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    def log_softmax(x: Array) -> Array:
        x = x.reshape(-1)[-320:].astype(np.float64)
        x = x - x.max()
        result: Array = x - np.log(np.exp(x).sum())
        return result

    rows = [(log_softmax(a), log_softmax(b)) for a, b in zip(found, wanted, strict=True)]
    return float(np.mean([(np.exp(q) * (q - p)).sum() for p, q in rows]))


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_onnxruntime(name: str, made: Callable[[str], Bundle], run: Runner, tmp_path: Path) -> None:
    """Token by token, in pieces, with both modules, on one thread and on two: also past the sliding window."""
    bundle = made(name)
    steps = [*pieces(IDS[:90], 1), *pieces(IDS[90:], 33, 1)]
    as_native = name.startswith("int4") or name in ("halves", "int8 dynamic", "float32")
    wanted = native(bundle, steps, None if as_native else tmp_path / "exact")
    first, *others = run.all(bundle, [{"reset": True, "steps": steps}], ENGINES)
    found = first["found"]
    limit = ROUNDED if "caches" in name else COARSE if as_native and name != "float32" else EXACT
    # The head in halves computes exactly the logits of a quarter of the tokens, of which the two may choose others.
    assert largest_difference(found, wanted, likely=40 if name == "halves" else 320) < limit
    if as_native and name != "float32":  # the control of the wide limit
        exact = native(made("float32"), steps)
        assert 0 < mean_kl(found, exact) <= 1.2 * mean_kl(wanted, exact)
    for engine, other in zip(ENGINES[1:], others, strict=True):
        assert len(other["found"]) == len(found), other
        assert all(np.array_equal(a, b) for a, b in zip(found, other["found"], strict=True)), engine


# Models of other shapes: what the fixture is not. 323 rows of a head are no multiple of what the kernels do together.
SHAPES: dict[str, tuple[dict[str, Any], Settings | None]] = {
    "silu, as many kv heads, global alone": (
        {"hidden_activation": "silu", "num_key_value_heads": 4, "layer_types": (FULL,) * 4},
        None,
    ),
    "relu, sliding alone, a larger vocabulary": (
        {"hidden_activation": "relu", "layer_types": (SLIDING,) * 4, "vocab_size": 323},
        None,
    ),
    "gelu, untied, one kv head": (
        {"hidden_activation": "gelu", "tie_word_embeddings": False, "num_key_value_heads": 1, "vocab_size": 323},
        INT8,
    ),
    "untied, dynamic": ({"tie_word_embeddings": False, "vocab_size": 323}, replace(INT8, dynamic=True)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_models_of_other_shapes(
    name: str,
    config: ModelConfig,
    make_model: Callable[..., CausalLM],
    tokenizer: Tokenizer,
    run: Runner,
    tmp_path: Path,
) -> None:
    fields, settings = SHAPES[name]
    save_checkpoint(tmp_path / "checkpoint", make_model(config.model_copy(update=fields)), tokenizer, {})
    bundle = source = export_bundle(tmp_path / "checkpoint", tmp_path / "onnx")
    if settings is not None:
        bundle = quantize_bundle(source, tmp_path / "quantized", TEXT, settings)[0]
    steps = [*pieces(IDS[:20], 1), IDS[20:60]]
    wanted = native(bundle, steps, tmp_path / "exact" if settings == INT8 else None)
    dynamic = settings is not None and settings.dynamic
    limit = 2 * COARSE if dynamic else EXACT  # these logits are twice as large
    for result in run.all(bundle, [{"reset": True, "steps": steps}], ENGINES[1:3]):
        assert largest_difference(result["found"], wanted, likely=bundle.config.vocab_size) < limit
        if dynamic:  # the control of the wide limit
            exact = native(source, steps)
            assert 0 < mean_kl(result["found"], exact) <= 1.2 * mean_kl(wanted, exact)


@pytest.mark.parametrize("name", ["float32", "int8", "int8 dynamic", "int4 with frequent rows"])
def test_pieces_have_the_logits_of_single_tokens(name: str, made: Callable[[str], Bundle], run: Runner) -> None:
    """Bit for bit, which needs the same order of all sums; also after the caches of sliding layers have wrapped."""
    ends = [7, 128, 149, 150]
    together = {"reset": True, "steps": [IDS[:7], IDS[7:128], IDS[128:149], IDS[149:]]}
    found = run(made(name), {"reset": True, "steps": pieces(IDS, 1)}, together, threads=2)["found"]
    alone = found[: len(IDS)]
    for end, logits in zip(ends, found[len(IDS) :], strict=True):
        assert np.array_equal(alone[end - 1], logits), end


@pytest.mark.parametrize("name", ["int8", "int8 caches"])
def test_a_text_is_resumed(name: str, made: Callable[[str], Bundle], run: Runner) -> None:
    """After a prompt is kept, other continuations begin from it: sliding caches, which have wrapped meanwhile, come back."""
    prompt, first, second = IDS[:100], IDS[100:148], [5, 6, 7]
    steps = pieces(prompt, 60, 40)
    anew = {"reset": True, "steps": [*steps, *pieces(second, 1)]}
    tasks = [
        {"reset": True, "steps": steps},
        {"keep": True, "steps": pieces(first, 1)},
        {"resume": [*prompt, *second], "steps": pieces(second, 1)},
        {"resume": [*prompt, *second, 9]},  # a longer text goes on
        {"resume": [*prompt[:50], 9]},  # another text begins anew
    ]
    everything = run(made(name), anew, *tasks)["found"]
    wanted, found = everything[: len(steps) + 3], everything[len(steps) + 3 :]
    reused = [each for each in found if isinstance(each, int)]
    assert reused == [100, 103, 0]
    after = [each for each in found if not isinstance(each, int)][len(steps) + len(first) :]
    assert all(np.array_equal(a, b) for a, b in zip(after, wanted[len(steps) :], strict=True)) and len(after) == 3


def test_the_model_that_ships_over_several_windows(run: Runner, tmp_path: Path) -> None:
    """Its caches have several pages, and its file has the tables of rotations of earlier versions."""
    bundle = Bundle.open(shipped.model_path())
    ids = np.random.default_rng(3).integers(0, 4096, 560).tolist()
    steps = pieces(ids, 128, 128, 128, 128, 1)
    wanted = native(bundle, steps, tmp_path / "exact")
    result = run(bundle, {"reset": True, "steps": steps}, threads=2)
    assert largest_difference(result["found"], wanted, likely=4096) < 0.02  # of logits up to 12
    layers, window_and_piece, row = 5, 128 + 128, 2 * 64 * 4
    assert result["caches"] == layers * window_and_piece * row + 3 * 256 * row
    assert result["bytes"] < 24e6


def test_threads_that_do_not_start(made: Callable[[str], Bundle], in_node: Node, run: Runner) -> None:
    """The engine does without them: a browser may refuse workers, and a worker may fail."""
    steps = pieces(IDS[:20], 10)
    wanted = run(made("int8"), {"reset": True, "steps": steps})["found"]
    for failure in (
        "this.onerror({ message: 'no more workers' })",
        "this.onmessage({ data: { problem: 'no memory' } })",
    ):
        broken = f"""globalThis.Worker = class {{
          postMessage() {{ setTimeout(() => {failure}, 1); }}
          terminate() {{ console.error("terminated"); }}
        }};"""
        program = PROGRAM.replace("await import(given.worker);", broken)
        assert program != PROGRAM
        found = Runner(lambda _, given, program=program: in_node(program, given))(
            made("int8"), {"reset": True, "steps": steps}, threads=3
        )["found"]
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_another_scale_is_noticed(made: Callable[[str], Bundle], run: Runner) -> None:
    """The control: one weight scale, half as large, moves logits beyond the limit."""
    bundle = made("int8")
    plan = engine_plan(bundle)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    scales = np.frombuffer(base64.b64decode(plan["tensors"][name]), np.float32).copy()
    scales[0] *= 0.5
    plan["tensors"][name] = base64.b64encode(scales.tobytes()).decode()
    steps = pieces(IDS[:40], 1)
    found = run(bundle, {"reset": True, "steps": steps})["found"]
    altered = run(bundle, {"reset": True, "steps": steps}, plan=plan)["found"]
    assert largest_difference(altered, found) > 3 * EXACT


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "is not inside the data file": lambda plan: plan["tensors"][NORM].__setitem__(0, 1 << 31),
    "bytes instead of": lambda plan: plan["tensors"][NORM].__setitem__(1, 8),
    "has no place": lambda plan: plan["tensors"].__setitem__(NORM, [-8, 256]),
    "model.layers.0.mlp.down_proj.weight_quantized has no place": lambda plan: plan["tensors"].pop(
        "model.layers.0.mlp.down_proj.weight_quantized"
    ),
    "vocab is 4294967296": lambda plan: plan["shape"].update(vocab=1 << 32),
    "heads is 0": lambda plan: plan["shape"].update(heads=0),
    "hidden is no multiple of 8": lambda plan: plan["shape"].update(hidden=60),
    "blocks of 3": lambda plan: plan["products"]["model.embed_tokens"].update(block_size=3),
    "embed_tokens has zero points": lambda plan: plan["products"]["model.embed_tokens"].update(zero_points=True),
    "has 3 bits": lambda plan: plan["products"]["model.embed_tokens"].update(bits=3),
    "has 321 frequent rows": lambda plan: plan["products"]["model.embed_tokens"].update(bits=4, frequent=321),
    "has 8 frequent rows": lambda plan: plan["products"]["model.embed_tokens"].update(frequent=8),
    # As halves, blocks of these would be larger than the kernels for 4-bit weights can hold.
    "embed_tokens has halves": lambda plan: plan["products"]["model.embed_tokens"].update(bits=0, halves=True),
    "down_proj has halves": lambda plan: plan["products"]["model.layers.0.mlp.down_proj"].update(halves=True),
    "has halves and frequent rows": lambda plan: plan["products"]["model.embed_tokens"].update(frequent=8, halves=True),
    "windows differ": lambda plan: plan["shape"].update(windows=[1, 2, None, 3]),
    "too large for a browser": lambda plan: plan["shape"].update(context=1 << 25),
    "heads are no multiple of kvHeads": lambda plan: plan["shape"].update(kvHeads=3),
    "headDim is no multiple of 8": lambda plan: plan["shape"].update(headDim=36),
    "epsilon is -1": lambda plan: plan["shape"].update(epsilon=-1),
    "activation tanh": lambda plan: plan["shape"].update(activation="tanh"),
    "cache float16": lambda plan: plan["shape"].update(cache="float16"),
    "candidates is 321": lambda plan: plan["shape"].update(candidates=321),
    "embed_tokens has 4 bits": lambda plan: plan["products"]["model.embed_tokens"].update(bits=4, dynamic=True),
    "it has no tensors": lambda plan: plan.pop("tensors"),
    "model.norm.weight is not in base64": lambda plan: plan["tensors"].update({NORM: "?"}),
    "it has no layers": lambda plan: plan["shape"].update(windows=[]),
}
NORM = "model.norm.weight"


@pytest.mark.parametrize("message", HOSTILE)
def test_a_wrong_plan_is_one_line(message: str, made: Callable[[str], Bundle], run: Runner) -> None:
    bundle = made("int8")
    plan = engine_plan(bundle)
    size = 4 * bundle.config.hidden_size
    content = (bundle.path / plan["data"]).read_bytes()
    plan["tensors"][NORM] = [len(content) - size, size]  # small tensors are in the plan itself: one that is in the file
    HOSTILE[message](plan)
    found = run(bundle, plan=plan, fails=True)
    assert message in found["message"] and "\n" not in found["message"] and found["hint"]


@pytest.mark.parametrize("token", [320, -1, 1 << 40])
def test_frequent_tokens_outside_the_vocabulary(token: int, made: Callable[[str], Bundle], run: Runner) -> None:
    """The head writes a logit at the place of each."""
    bundle = made("int4 with frequent rows")
    plan = engine_plan(bundle)
    ids = np.arange(plan["products"]["model.embed_tokens"]["frequent"], dtype=np.int64)
    for last, fails in ((319, False), (token, True)):
        ids[-1] = last
        plan["tensors"]["model.embed_tokens.frequent_ids"] = base64.b64encode(ids.tobytes()).decode()
        result = run(bundle, plan=plan, fails=fails)
    assert result["message"] == "a frequent token is not in the vocabulary"


def test_steps_outside_the_model_are_refused(made: Callable[[str], Bundle], run: Runner) -> None:
    for step, message in (([320], "vocabulary"), ([-1], "vocabulary"), ([], "not a step"), ([1] * 129, "not a step")):
        assert message in run(made("int8"), {"reset": True, "steps": [step]}, fails=True)["message"]
    full = run(made("int8"), {"reset": True, "steps": [[1] * 128, [1] * 128, [1]]}, fails=True)
    assert "1 tokens after 256 are not a step" in full["message"]


def test_bundles_for_onnxruntime_web(shared_bundle: Bundle, portable_bundle: Bundle, tmp_path: Path) -> None:
    """What the engine does not read is named, with what to do; `slm web` says it."""
    with pytest.raises(NotSupported, match="its graph is portable") as problem:
        engine_plan(portable_bundle)
    assert problem.value.hint == "slm export --onnx --target fused"
    shutil.copytree(shared_bundle.path, tmp_path / "foreign")
    graph = onnx.load(tmp_path / "foreign" / shared_bundle.manifest.model, load_external_data=False)
    graph.graph.node[-1].op_type = "Identity"
    onnx.save(graph, tmp_path / "foreign" / shared_bundle.manifest.model)
    foreign = seal(tmp_path / "foreign", shared_bundle.manifest)
    with pytest.raises(NotSupported, match="slm did not write its graph"):
        engine_plan(foreign)


def test_slm_web_warns_about_slow_bundles(
    slm: Callable[..., Any], vendor: None, portable_bundle: Bundle, shared_bundle: Bundle, made: Callable[[str], Bundle]
) -> None:
    for bundle, words in (
        (portable_bundle, "runs this bundle with onnxruntime-web, which is slower: its graph is portable (slm export"),
        (shared_bundle, "float32 weights are four times as large and as slow as INT8 (slm quantize --int8)"),
        (made("int8"), None),
    ):
        result = slm("web", bundle.path, "--out", "site")
        assert result.code == 0 and (words in result.err if words else "note:" not in result.err), result.err
        files = [path.name for path in Path("site").rglob("*")]
        assert ("ort.wasm.min.mjs" in files) == (bundle is portable_bundle) != ("simd.wasm" in files)
        licences = Path("site/licences.txt").read_text(encoding="utf-8")
        assert ("onnxruntime-web 1.30.0, MIT" in licences) == ("Microsoft" in licences) == (bundle is portable_bundle)
