"""The page's benchmark in Node: what is measured, and the shape of its JSON."""

from collections.abc import Callable
from typing import Any

Node = Callable[..., Any]

SITE = {
    "slm": "1.2.3",
    "name": "mine",
    "files": {"model/a": {"bytes": 300}, "model/b": {"bytes": 20}, "app.js": {"bytes": 7}},
    "model": {"files": ["model/a", "model/b"], "parameters": 99, "precision": "int8", "device": "webgpu"},
}
WHERE = {"browser": "Any", "processors": 4, "memory_gb": None, "isolated": True, "gpu": None}
RAN = {
    "runtime": "wasm",
    "loaded": {"threads": 2},
    "loadMs": 1234.5678,
    "stored": False,
    "run": {"ttftMs": [100.123456, 90, 95], "tokensPerSecond": [10.5, 12.25, 11], "memory": {"runtime": 414_000_000}},
    "pageBytes": 500_000_000,
}


def test_the_json_and_the_rows(in_node: Node) -> None:
    program = """
    import { cells, report } from "page/bench-report.js";
    const found = report(given.site, given.where, given.results, new Date(Date.UTC(2026, 0, 2, 3, 4, 5, 678)));
    console.log(JSON.stringify({ found, rows: found.results.map(cells) }));
    """
    missing = {"runtime": "webgpu", "problem": "this browser offers no GPU (WebGPU)"}
    engine = {**RAN, "runtime": "engine", "loaded": {"threads": 1}}
    engine["run"] = {**RAN["run"], "ttftMs": [], "tokensPerSecond": []}  # it was stopped
    answer = in_node(program, {"site": SITE, "where": WHERE, "results": [RAN, missing, engine]})
    found = answer["found"]
    assert {name: found[name] for name in found if name != "results"} == {
        "slm_bench": 1,
        "date": "2026-01-02T03:04:05Z",
        "slm": "1.2.3",
        "model": {"name": "mine", "parameters": 99, "precision": "int8", "device": "webgpu", "bytes": 320},
        **WHERE,
        "prompt_tokens": 128,
        "new_tokens": 64,
    }
    assert found["results"][0] == {
        "backend": "WebAssembly",
        "engine": "onnxruntime-web",
        "threads": 2,
        "load_ms": 1235,
        "from_store": False,
        "ttft_ms": [100.1, 90, 95],
        "tokens_per_s": [10.5, 12.25, 11],
        "memory_bytes": 414_000_000,
        "page_bytes": 500_000_000,
    }
    assert found["results"][1] == {"backend": "WebGPU", "engine": "onnxruntime-web", "problem": missing["problem"]}
    assert found["results"][2]["engine"] == "slm" and found["results"][2]["tokens_per_s"] == []
    assert answer["rows"] == [
        ["WebAssembly, 2 threads", "11.0 (10.5 to 12.3)", "95 ms", "1.2 s", "414 MB"],
        ["WebGPU", missing["problem"]],
        ["WebAssembly, 1 thread", "–", "–", "1.2 s", "414 MB"],
    ]


def test_medians(in_node: Node) -> None:
    program = """
    import { spread } from "page/bench-report.js";
    console.log(JSON.stringify(given.map(spread)));
    """
    assert in_node(program, [[3, 1, 2], [4, 1, 3, 2], [], [5]]) == [
        {"median": 2, "min": 1, "max": 3},
        {"median": 2.5, "min": 1, "max": 4},
        None,
        {"median": 5, "min": 5, "max": 5},
    ]


def test_what_is_measured(in_node: Node, vendor: None) -> None:
    """Each round reads the whole prompt from nothing in pieces and takes one step for each token."""
    program = """
    import { measure, promptIds } from "page/measure.js";
    const steps = [];
    const decoder = {
      reset: () => steps.push("reset"),
      step: async (ids) => { steps.push(ids.length); return Float32Array.of(0, 1, 0); },
    };
    const ids = promptIds({ encode: () => [5, 6, 7] }, 200);
    const told = [];
    const plan = { newTokens: 10, rounds: 2 };
    const run = await measure(decoder, ids, plan, { told: ({ round }) => told.push(round) });
    const taken = steps.splice(0);
    let count = 0;
    const stopped = await measure(decoder, ids, plan, { stopped: () => ++count > 25 });
    console.log(JSON.stringify({ ids: ids.slice(0, 5), run, told, taken, stopped, none: promptIds({ encode: () => [] }, 2) }));
    process.exit(0); // the channel of `breath` waits for more
    """
    found = in_node(program)
    assert found["ids"] == [5, 6, 7, 5, 6] and found["none"] == [0, 0] and found["told"] == [0, 1, 2]
    once = ["reset", 128, 72]
    assert found["taken"] == [*once, *[1] * 8, *once, *[1] * 10, *once, *[1] * 10, "reset"]
    assert len(found["run"]["ttftMs"]) == len(found["run"]["tokensPerSecond"]) == 2
    assert min(found["run"]["tokensPerSecond"]) > 0 and len(found["stopped"]["ttftMs"]) == 1
