"""The processes that `benchmarks/peers.py` sets side by side: one engine and one model each, a turn for each line it is sent.

    python benchmarks/contenders.py ENGINE MODEL THREADS CONTEXT

A line is an object: {"read": N, "new": M} reads a prompt of N tokens from nothing and writes M greedily; {"steps": M,
"position": P, "batch": B} takes M greedy steps of B rows that have read P tokens (slm alone). The answer has the seconds.
Before each turn an engine runs for half a second that does not count. Engines import nothing of each other.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Seconds for which an engine runs before each turn.
WARM_UP_S = 0.5


class Slm:
    """A bundle with onnxruntime."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        from slm.loading import load

        self.decoder: Any = load(model, threads=threads).decoder
        self.vocab_size = self.decoder.vocab_size
        self.reset = self.decoder.reset

    def step(self, ids: list[int]) -> int:
        """Reads tokens and returns the likeliest next one."""
        return int(self.decoder.read(ids).argmax())

    def rows(self, position: int, batch: int, steps: int) -> float:
        """Returns the seconds of so many steps."""
        import numpy as np

        from slm.runtime.bench import Case, OnnxRows

        rows = OnnxRows(self.decoder, Case(position, batch), steps + 2)
        ids = rows.step(np.zeros((batch, 1), np.int64)).argmax(-1)[:, None]
        began = time.perf_counter()
        for _ in range(steps):
            ids = rows.step(ids).argmax(-1)[:, None]
        return time.perf_counter() - began


class LlamaCpp:
    """A GGUF file with llama.cpp, through its C functions; windows as windows, which is its programs' default."""

    # Flash attention: -1 lets llama.cpp choose, 0 is off, 1 is on.
    flash = -1

    def __init__(self, model: str, threads: int, context: int) -> None:
        import llama_cpp
        import numpy as np

        self.api, self.numpy = llama_cpp, np
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.keep = quiet
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        params.flash_attn_type = self.flash
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        """Forgets what was read."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def step(self, ids: list[int]) -> int:
        """Reads tokens and returns the likeliest next one."""
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            tokens = (self.api.llama_token * len(part))(*part)
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class LlamaCppFlash(LlamaCpp):
    """llama.cpp with flash attention."""

    flash = 1


class LlamaCppPlain(LlamaCpp):
    """llama.cpp without flash attention."""

    flash = 0


class LlamaWheel:
    """A GGUF file with llama.cpp's server in a wheel (xllamacpp), which is built for AVX2; its own timings."""

    flash = "AUTO"

    def __init__(self, model: str, threads: int, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = model, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib = 0
        params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{self.flash}")
        self.server = xllamacpp.Server(params)
        self.vocab_size = 0

    def timed(self, ids: list[int], new: int) -> dict[str, float]:
        """Reads a prompt and writes tokens greedily; returns seconds."""
        wanted = {"prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings = self.server.handle_completions(wanted)["timings"]
        return {"read_s": timings["prompt_ms"] / 1e3, "decode_s": timings["predicted_ms"] / 1e3}


class LlamaWheelFlash(LlamaWheel):
    """The wheel with flash attention."""

    flash = "ENABLED"


class LlamaWheelPlain(LlamaWheel):
    """The wheel without flash attention."""

    flash = "DISABLED"


class OpenVino:
    """A directory that optimum-intel made, with OpenVINO itself; logits of the last position only, as its GenAI has it."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import numpy as np
        import openvino
        from openvino import opset13 as ops

        self.numpy = np
        core = openvino.Core()
        graph = core.read_model(Path(model) / "openvino_model.xml")
        product = graph.output("logits").node.input_value(0).get_node()
        while product.get_type_name() != "MatMul":
            product = product.input_value(0).get_node()
        hidden = product.input_value(0)  # (B, T, D)
        one, two = (np.array([value], np.int64) for value in (-1, 2**31 - 1))
        last = ops.slice(hidden, one, two, np.array([1], np.int64), np.array([1], np.int64))
        product.input(0).replace_source_output(last.output(0))
        graph.validate_nodes_and_infer_types()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self.request = core.compile_model(graph, "CPU", settings).create_infer_request()
        self.vocab_size = int(graph.output("logits").partial_shape[2].get_length())
        self.inputs = {name for port in graph.inputs for name in port.names}
        self.length = 0

    def reset(self) -> None:
        """Forgets what was read."""
        self.request.reset_state()
        self.length = 0

    def step(self, ids: list[int]) -> int:
        """Reads tokens and returns the likeliest next one."""
        np, past = self.numpy, self.length
        self.length += len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(past, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: value for name, value in inputs.items() if name in self.inputs})
        return int(self.request.get_tensor("logits").data[0, -1].argmax())


class Genai:
    """Our bundle with onnxruntime-genai."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import onnxruntime_genai as genai

        self.genai, self.context = genai, context
        config = genai.Config(model)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = genai.Model(config)
        self.vocab_size = json.loads((Path(model) / "genai_config.json").read_text())["model"]["vocab_size"]
        self.reset()

    def reset(self) -> None:
        """Forgets what was read."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, min_length=self.context, do_sample=False)
        self.generator = self.genai.Generator(self.model, params)

    def step(self, ids: list[int]) -> int:
        """Reads tokens and returns the likeliest next one."""
        # It has the last token it chose already.
        if len(ids) > 1:
            self.generator.append_tokens(ids)
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


ENGINES = {
    "slm": Slm,
    "llama.cpp": LlamaCpp,
    "llama.cpp flash": LlamaCppFlash,
    "llama.cpp plain": LlamaCppPlain,
    "xllamacpp flash": LlamaWheelFlash,
    "xllamacpp plain": LlamaWheelPlain,
    "openvino": OpenVino,
    "onnxruntime-genai": Genai,
}


def warm_up(engine: Any) -> None:
    """Keeps an engine busy for a moment before its turn, so that a short prompt starts with the same clock as a long one.

    Every turn follows an idle pause, and a long prompt alone would outlast the time that a processor needs to speed up.
    """
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        if isinstance(engine, LlamaWheel):
            engine.timed(list(range(64)), 1)
        else:
            engine.reset()
            engine.step(list(range(64)))


def turn(engine: Any, wanted: dict[str, int]) -> dict[str, float]:
    """Returns the seconds of what is wanted, and the memory that is resident afterwards."""
    import random

    from slm.core.processes import resident_mib

    warm_up(engine)
    if "steps" in wanted:
        return {"decode_s": engine.rows(wanted["position"], wanted["batch"], wanted["steps"])}
    ids = random.Random(0).choices(range(300), k=wanted["read"])
    if isinstance(engine, LlamaWheel):
        return engine.timed(ids, wanted["new"]) | {"rss_mib": resident_mib() or 0.0}
    engine.reset()
    began = time.perf_counter()
    token = engine.step(ids)
    first = time.perf_counter()
    for _ in range(wanted["new"] - 1):
        token = engine.step([token])
    seconds = {"read_s": first - began, "decode_s": time.perf_counter() - first}
    return seconds | {"rss_mib": resident_mib() or 0.0}


def main() -> None:
    """Is a contender until its input ends. What libraries print goes to standard error."""
    engine, model, threads, context = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    running = ENGINES[engine](model, int(threads), int(context))
    answers.write(json.dumps({"vocab_size": running.vocab_size}) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(turn(running, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
