"""Speed of the 270M shape on this machine, each precision in the same run.

Random weights at the full shape (speed does not depend on their values) are exported and quantized once into
`bench-results/`, then every backend decodes and prefills in turn, several rounds, and the median of each is taken: the
machine's mood changes all of them alike. The last line is one JSON object.

usage: python benchmarks/decode.py [--rounds 5] [--prompt 512] [--new 128]
"""

import argparse
import json
import platform
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch

import slm
from slm.core.machine import usable_cores
from slm.core.manifest import Bundle
from slm.core.nn import CausalLM, save_checkpoint
from slm.core.presets import preset
from slm.export.bundle import export_bundle
from slm.quantize.int8 import Int8Settings, quantize_int8
from slm.quantize.quality import Text
from slm.runtime.generate import generate
from slm.runtime.sampling import GREEDY
from slm.train.data.tokenizer import train_bpe

HOME = Path("bench-results")


def prepare() -> dict[str, Path]:
    """Makes checkpoint, float32 bundle and INT8 bundles of the 270M shape, unless they are there."""
    paths = {name: HOME / "gemma3-270m" / name for name in ("checkpoint", "onnx", "onnx-int8", "onnx-int8-b32")}
    config = preset("gemma3-270m")
    if not paths["checkpoint"].exists():
        model = CausalLM(config)
        model.init_weights(torch.Generator().manual_seed(0))
        tokenizer = train_bpe(["Only to have one."], 300, config.max_position_embeddings)
        save_checkpoint(paths["checkpoint"], model, tokenizer, {"made_by": "benchmarks/decode.py"})
    if not paths["onnx"].exists():
        export_bundle(paths["checkpoint"], paths["onnx"])
    source = Bundle.open(paths["onnx"])
    rows = torch.randint(0, config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0)).numpy()
    for name, block_size in (("onnx-int8", 128), ("onnx-int8-b32", 32)):
        if not paths[name].exists():
            quantize_int8(source, paths[name], Text("random tokens", rows), Int8Settings(block_size))
    return paths


def measure(decoder: Any, prompt: int, new: int) -> dict[str, float]:
    """Reads a prompt and decodes greedily, once."""
    run, tokens = generate(decoder, [1 + i % 200 for i in range(prompt)], GREEDY, new, stop=())
    assert len(list(tokens)) == new
    return {"decode_tok_s": run.decode_tok_s or 0.0, "prefill_tok_s": run.prefill_tok_s, "ttft_ms": run.ttft_ms}


def main() -> None:
    """Prints a table, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    paths = prepare()
    decoders = {name: slm.load(path).decoder for name, path in paths.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
    for round_ in range(options.rounds + 1):
        for name, decoder in decoders.items():
            figures = measure(decoder, options.prompt, options.new)
            if round_:  # the first warms up
                found[name].append(figures)
    results = {
        name: {figure: round(median(run[figure] for run in runs), 1) for figure in runs[0]}
        for name, runs in found.items()
    }
    for name, path in paths.items():
        files = [file for file in path.rglob("*") if file.is_file()]
        results[name]["megabytes"] = round(sum(file.stat().st_size for file in files) / 1e6, 1)
        figures = results[name]
        print(
            f"{name:14} {figures['megabytes']:7.1f} MB  decode {figures['decode_tok_s']:7.1f} tok/s  "
            f"prefill {figures['prefill_tok_s']:8.1f} tok/s  first token {figures['ttft_ms']:7.1f} ms"
        )
    machine = {"processor": platform.processor() or platform.machine(), "cores": usable_cores()}
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "slm": slm.__version__}
    print(json.dumps(machine | versions | vars(options) | {"results": results}))


if __name__ == "__main__":
    main()
