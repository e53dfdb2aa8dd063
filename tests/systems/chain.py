"""Makes models with every command of the chain, in a process that `hiding` has made like one on another system."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import hiding

SYSTEM, MODULES = sys.argv[1], sys.argv[2].split()
hiding.install(SYSTEM)

import torch

from slm.cli.main import main
from slm.steps.bars import RichProgress

torch.set_num_threads(1)
os.environ["MPLBACKEND"] = "agg"
codes = {}


def slm(name, *arguments):
    try:
        main([str(each) for each in arguments])
    except SystemExit as done:
        codes[name] = done.code
    print("$", name, codes[name], file=sys.stderr)


def stopped(name, steps, *arguments):
    """Runs a command that Ctrl-C stops after a number of steps."""
    usual, left = RichProgress.advance, [steps]

    def advance(self, amount=1, **fields):
        usual(self, amount, **fields)
        left[0] -= amount == 1
        if amount == 1 and not left[0]:
            os.kill(os.getpid(), signal.SIGINT)

    RichProgress.advance = advance
    slm(f"{name} stopped", *arguments)
    RichProgress.advance = usual
    codes[f"{name} stopped"] -= 130


for module in MODULES:
    importlib.import_module(module)
Path("text.txt").write_bytes("One day a fox saw a “bird”.\r\nThe bird flew away.\r\n\r\n".encode() * 400)
rows = json.dumps({"prompt": "One day", "completion": " a fox saw a bird."}) + "\r\n"
Path("rows.jsonl").write_bytes(rows.encode() * 24)
RECIPE = """
name: tiny
data: {train: [text.txt], tokenizer: bpe}
model:
  {preset: tiny, vocab_size: 288, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
   layer_types: [sliding_attention, full_attention], head_dim: 32, query_pre_attn_scalar: 32, sliding_window: 8,
   max_position_embeddings: 128}
batch: {batch_size: 4, context: 32}
schedule: {micro_steps: 4, warmup_micro_steps: 1, learning_rate: 1.0e-3, final_learning_rate: 1.0e-4}
evaluation: {every_micro_steps: 2, windows: 4}
checkpoints: {every_updates: 1, keep: 1}
machine: {device: cpu}
"""
Path("tiny.yaml").write_text(RECIPE, encoding="utf-8")
slm("data", "data", "prepare", "--data", "text.txt", "--vocab-size", 300, "--out", "set")
slm("data again", "data", "prepare", "--data", "text.txt", "--vocab-size", 300, "--out", "set", "--overwrite")
slm("train", "train", "--recipe", "tiny.yaml", "--out", "runs/tiny")
slm("train again", "train", "--recipe", "tiny.yaml", "--out", "runs/tiny", "--overwrite")
stopped("train", 6, "train", "--recipe", "tiny.yaml", "--set", "schedule.micro_steps=12", "--out", "runs/cut")
slm("resume", "train", "--resume", "--out", "runs/cut")
best = Path("runs/tiny/checkpoint/best")
for number in ("", " again"):
    slm(f"export{number}", "export", "--onnx", best, "--out", "runs/tiny/onnx")
    slm(f"quantize{number}", "quantize", "--int8", "runs/tiny/onnx", "--data", "text.txt", "--tokens", 64, "--max-kl", 9,
        "--out", "runs/tiny/int8")  # fmt: skip
    slm(f"finetune{number}", "finetune", "--lora", "rows.jsonl", "--base", best, "--epochs", 1, "--out", "runs/tiny/adapters/a",
        *(["--overwrite"] if number else []))  # fmt: skip
    slm(f"merge{number}", "merge", best, "--adapter", "runs/tiny/adapters/a", "--out", "merged")
    slm(f"gguf{number}", "export", "--gguf", best, "--out", "tiny.gguf")
tune = "finetune", "--lora", "rows.jsonl", "--base", best, "--epochs", 3, "--out", "runs/tiny/adapters/b"
stopped("finetune", 3, *tune)
slm("go on", *tune)
slm("import", "import", "tiny.gguf", "--out", "imported")
slm("verify", "verify", "runs/tiny/int8", "--against", best)
slm("eval", "eval", best, "--data", "text.txt")
slm(
    "generate", "generate", r"tiny\int8" if SYSTEM == "windows" else "tiny/int8", "-p", "One day", "--max-new-tokens", 3
)
slm("adapter", "generate", best, "--adapter", "runs/tiny/adapters/a", "-p", "One day", "--max-new-tokens", 3)
slm("rm", "rm", "runs/tiny/onnx", "--yes")
print(json.dumps({"codes": codes, "refused": hiding.REFUSED}))
