"""The files that `benchmarks/peers.py` runs: one checkpoint of the 270M shape in every format, under bench-results/peers.

As a program it makes those that only a peer's own packages make, with these first in its path:

    python benchmarks/peer_files.py quantize F16.gguf Q4_0.gguf
    python benchmarks/peer_files.py openvino CHECKPOINT DIRECTORY
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path("bench-results/peers")
PEERS = Path("build/peers")
LONG = 32_768

_CHECKPOINT, _ONNX, _LONG = (str(HOME / name) for name in ("checkpoint", "onnx", "onnx-long"))
# Random weights predict nothing, so how far their predictions move says nothing either.
_INT8, _LOOSELY = ("quantize", "--int8"), ("--tokens", "1024", "--max-kl", "99")
# Commands of slm by what they make, in an order in which each finds what it needs.
_MADE_BY_SLM: dict[str, Sequence[str]] = {
    "onnx": ("export", "--onnx", _CHECKPOINT),
    "onnx-portable": ("export", "--onnx", _CHECKPOINT, "--target", "portable"),
    "onnx-long": ("export", "--onnx", _CHECKPOINT, "--context", str(LONG)),
    "onnx-int8": (*_INT8, _ONNX, "--block-size", "128", *_LOOSELY),
    "onnx-int8-kv32": (*_INT8, _ONNX, "--block-size", "128", "--kv-cache", "float32", *_LOOSELY),
    "onnx-int8-kv8": (*_INT8, _ONNX, "--block-size", "128", "--kv-cache", "int8", *_LOOSELY),
    "onnx-int8-b32": (*_INT8, _ONNX, "--block-size", "32", *_LOOSELY),
    "onnx-long-int8": (*_INT8, _LONG, "--block-size", "128", "--kv-cache", "float32", *_LOOSELY),
    "onnx-long-int8-kv8": (*_INT8, _LONG, "--block-size", "128", "--kv-cache", "int8", *_LOOSELY),
    "q8_0.gguf": ("export", "--gguf", _CHECKPOINT, "--gguf-type", "q8_0"),
    "f16.gguf": ("export", "--gguf", _CHECKPOINT, "--gguf-type", "f16"),
}
# The real Gemma 3 270M (`make build/peers/gemma-3-270m-q4_k_m.gguf`), and what slm makes from it.
REAL = PEERS / "gemma-3-270m-q4_k_m.gguf"
_GEMMA = {name: str(HOME / f"gemma-{name}") for name in ("checkpoint", "onnx")}
_MADE_FROM_GEMMA: dict[str, Sequence[str]] = {
    "gemma-checkpoint": ("import", str(REAL)),
    "gemma-q8_0.gguf": ("export", "--gguf", _GEMMA["checkpoint"], "--gguf-type", "q8_0"),
    "gemma-onnx": ("export", "--onnx", _GEMMA["checkpoint"]),
    "gemma-int8": ("quantize", "--int8", _GEMMA["onnx"]),
}
# The packages that make the others, and what this file is told then.
_MADE_BY_PEERS = {
    "q4_0.gguf": ("llamacpp-native", ("quantize", str(HOME / "f16.gguf"))),
    "openvino": ("openvino", ("openvino", _CHECKPOINT)),
}


def prepare() -> None:
    """Makes every file that is not there yet; delete one to have it made again."""
    HOME.mkdir(parents=True, exist_ok=True)
    if not (HOME / "checkpoint").exists():
        _make_checkpoint(HOME / "checkpoint")
    for name, command in _MADE_BY_SLM.items():
        _make(HOME / name, (sys.executable, "-m", "slm", *command, "--out"), None)
    for name, (packages, arguments) in _MADE_BY_PEERS.items():
        if (PEERS / packages).is_dir():
            _make(HOME / name, (sys.executable, __file__, *arguments), packages)


def prepare_gemma() -> None:
    """Makes the files of the real Gemma that are not there yet."""
    HOME.mkdir(parents=True, exist_ok=True)
    for name, command in _MADE_FROM_GEMMA.items():
        _make(HOME / name, (sys.executable, "-m", "slm", *command, "--out"), None)


def environment(packages: str | None) -> dict[str, str]:
    """Returns the environment with a peer's packages first."""
    before = os.environ.get("PYTHONPATH", "")
    first = [] if packages is None else [str((PEERS / packages).resolve())]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*first, *([before] if before else [])])}


def _make(path: Path, command: Sequence[str], packages: str | None) -> None:
    """Runs a command that makes a file; if it fails the file is missing, and what it said is shown."""
    if path.exists():
        return
    print(f"making {path}", flush=True)
    done = subprocess.run([*command, str(path)], env=environment(packages), capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)


def _make_checkpoint(path: Path) -> None:
    """Writes random weights with a tokenizer of a thousand tokens; the other rows of the table are never asked for."""
    import torch

    from slm.core import sample
    from slm.core.nn import CausalLM, save_checkpoint
    from slm.core.presets import preset
    from slm.train.data.tokenizer import train_bpe

    config = preset("gemma3-270m").model_copy(update={"bos_token_id": 0, "eos_token_id": (0,), "pad_token_id": 3})
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    stories = sample.stories_path().read_text(encoding="utf-8")
    tokenizer = train_bpe([stories], 1000, config.max_position_embeddings)
    save_checkpoint(path, model, tokenizer, {"made_by": "benchmarks/peers.py"})


def _quantize(source: str, target: str) -> None:
    """Makes a Q4_0 file as llama.cpp's quantizer does."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


def _openvino(checkpoint: str, target: str) -> None:
    """Exports a checkpoint with optimum-intel, matrices in 8 bits by channel."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = OVWeightQuantizationConfig(bits=8)
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, quantization_config=bits)
    model.save_pretrained(target)


if __name__ == "__main__":
    {"quantize": _quantize, "openvino": _openvino}[sys.argv[1]](*sys.argv[2:])
