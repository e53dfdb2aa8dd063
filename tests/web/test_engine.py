"""The page's own engine: its logits are those of onnxruntime for every kind of bundle that it reads, in Node."""

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from slm.core.manifest import Bundle, seal
from slm.export.bundle import ExportOptions, export_bundle
from slm.quantize.make import quantize_bundle
from slm.quantize.settings import Gate, Settings
from slm.quantize.texts import TokenRows
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
# More than three windows of the model, and more than one piece of a prefill.
IDS = np.random.default_rng(5).integers(0, 320, 150).tolist()
# Of logits up to 8. With 8-bit weights, the engine rounds activations to 16 bits, which native kernels at accuracy level 0 do not
# round; cached keys are rounded to 8 bits, and one that lies between two integers makes the difference.
EXACT, ROUNDED = 4e-3, 0.05
# With 4-bit weights, both round activations to 8 bits. An activation between two integers makes the difference here.
TIES = 1.0

PROGRAM = """
import v8 from "node:v8";
v8.setFlagsFromString("--experimental-wasm-relaxed-simd");
await import(given.worker);
const { Engine } = await import("page/engine.js");
const size = fs.statSync(given.data).size;
const module = new Uint8Array(fs.readFileSync(given.module));
let engine = null;
const found = [];
try {
  engine = new Engine(given.plan, size, given.threads);
  engine.data.set(fs.readFileSync(given.data));
  await engine.start(module);
  for (const task of given.tasks) {
    if (task.reset) engine.reset();
    if (task.keep) engine.keep();
    if (task.resume) found.push(engine.resume(task.resume));
    for (const ids of task.steps ?? []) {
      const logits = new Float32Array(await engine.step(ids));
      found.push(Buffer.from(logits.buffer).toString("base64"));
    }
  }
  console.log(JSON.stringify({ found, bytes: engine.bytes, caches: engine.cacheBytes }));
} catch (error) {
  console.log(JSON.stringify({ message: error.message, hint: error.hint }));
}
engine?.close();
"""


@pytest.fixture(scope="session")
def made(shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Returns a function that makes a bundle by its name in `SETTINGS`."""
    home, known = tmp_path_factory.mktemp("engine"), {"float32": shared_bundle}
    text = TokenRows("random", np.random.default_rng(0).integers(0, 320, (2, 64)))

    def make(name: str) -> Bundle:
        if name not in known:
            known[name] = quantize_bundle(shared_bundle, home / name, text, SETTINGS[name])[0]
        return known[name]

    return make


class Runner:
    """Runs tasks with the engine in Node."""

    def __init__(self, in_node: Node) -> None:
        self._in_node = in_node

    def __call__(self, bundle: Bundle, tasks: Sequence[dict[str, Any]], **options: Any) -> Any:
        fails = options.pop("fails", False)
        plan = options.pop("plan", None) or engine_plan(bundle)
        given = {
            "plan": plan,
            "data": str(options.pop("data", bundle.path / plan["data"])),
            "worker": (Path(__file__).parent / "node_worker.mjs").as_uri(),
            "module": str(Path(options.pop("home", STATIC)) / options.pop("module", "relaxed.wasm")),
            "threads": options.pop("threads", 1),
            "tasks": list(tasks),
        }
        assert not options
        found = self._in_node(PROGRAM, given)
        assert "found" in found or fails, found
        if "found" in found:
            found["found"] = [
                np.frombuffer(base64.b64decode(each), np.float32) if isinstance(each, str) else each
                for each in found["found"]
            ]
        return found


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
    return [np.array(decoder.step(np.array([ids], np.int64))) for ids in steps]


def largest_difference(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    assert len(found) == len(wanted)
    return max(float(np.abs(a - b.reshape(-1)[-a.size :]).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_onnxruntime(
    name: str, made: Callable[[str], Bundle], run: Runner, tmp_path: Path
) -> None:
    """Token by token, in pieces, with both modules, on one thread and on two: also past the sliding window."""
    bundle = made(name)
    steps = [*pieces(IDS[:90], 1), *pieces(IDS[90:], 33, 1)]
    exact = not name.startswith("int4")
    wanted = native(bundle, steps, tmp_path / "exact" if exact and name != "float32" else None)
    found = run(bundle, [{"reset": True, "steps": steps}])["found"]
    limit = TIES if not exact else ROUNDED if "caches" in name else EXACT
    print(name, largest_difference(found, wanted), limit, [f"{largest_difference([a], [b]):.1e}" for a, b in zip(found, wanted)][::12])
    assert largest_difference(found, wanted) < limit
    for options in ({"module": "simd.wasm"}, {"threads": 2}, {"threads": 3, "module": "simd.wasm"}):
        again = run(bundle, [{"reset": True, "steps": steps}], **options)["found"]
        assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True)), options
