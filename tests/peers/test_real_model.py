"""The real Gemma 3 270M, from a GGUF file to text: `make test-real` fetches it; its licence is Gemma's.

Each step is one command in a process of its own, timed and with its memory measured: under three minutes and 4 GB in all.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(900)]

REAL = Path(__file__).parents[2] / "build" / "peers" / "gemma-3-270m-q4_k_m.gguf"
PROMPTS = ["The capital of France is", "Once upon a time, there was a little fox who", "def fibonacci(n):\n    "]
TOKENS = 40
SECONDS, BYTES = 180, 4e9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs `slm ARGUMENTS --json` and returns what it printed, with seconds and peak memory."""
    if not REAL.is_file():
        pytest.skip("no Gemma 3 270M under build/peers; `make test-real` fetches it")
    home = tmp_path_factory.mktemp("real")

    def slm(*arguments: object) -> dict[str, Any]:
        import resource

        started = time.monotonic()
        command = [sys.executable, "-m", "slm", *map(str, arguments), "--json"]
        done = subprocess.run(
            command, cwd=home, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        assert done.returncode == 0, done.stderr
        # Of the largest child so far: an upper bound for this one.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return json.loads(done.stdout) | {"wall_s": time.monotonic() - started, "peak_bytes": peak, "home": home}

    return slm


@pytest.fixture(scope="module")
def chain(run: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """GGUF, checkpoint, ONNX, INT8, text: one command each, every one finding the step before."""
    return {
        "import": run("import", REAL),
        "export": run("export", "--onnx"),
        "quantize": run("quantize", "--int8"),
        "generate": run("generate", "--greedy", "--max-new-tokens", TOKENS, "-p", PROMPTS[0]),
    }


def test_the_chain_in_three_minutes_and_4_gb(chain: dict[str, dict[str, Any]]) -> None:
    for name, step in chain.items():
        print(f"{name}: {step['wall_s']:.1f} s, at most {step['peak_bytes'] / 1e9:.2f} GB so far")
    assert len(chain["generate"]["tokens"]) == TOKENS
    assert sum(step["wall_s"] for step in chain.values()) < SECONDS
    assert max(step["peak_bytes"] for step in chain.values()) < BYTES


def greedy(run: Callable[..., dict[str, Any]], model: Path) -> list[list[int]]:
    options = ("--greedy", "--max-new-tokens", TOKENS)
    return [run("generate", model, *options, "-p", prompt)["tokens"] for prompt in PROMPTS]


def test_everybody_says_the_same(
    run: Callable[..., dict[str, Any]],
    chain: dict[str, dict[str, Any]],
    transformers4: Callable[..., Any],
    llama_cpp: Callable[[Path, Sequence[str], int], list[list[int]]],
) -> None:
    """slm's bundle and checkpoint, transformers and llama.cpp, all in float32 from the same weights."""
    home = chain["import"]["home"]
    checkpoint = home / chain["import"]["checkpoint"]
    written = run("export", "--gguf", checkpoint, "--gguf-type", "f32")
    texts = {
        "slm, onnxruntime": greedy(run, checkpoint.parents[1] / "onnx"),
        "slm, PyTorch": greedy(run, checkpoint),
        "transformers 4.57": transformers4("generate", checkpoint, "none", TOKENS, json.dumps(PROMPTS))["ids"],
        "llama.cpp": llama_cpp(home / written["gguf"], PROMPTS, TOKENS),
        "transformers 5": transformers5(checkpoint),
    }
    assert all(len(text) == TOKENS for text in texts["slm, onnxruntime"])
    assert {name: text == texts["slm, onnxruntime"] for name, text in texts.items()} == dict.fromkeys(texts, True)


def transformers5(checkpoint: Path) -> list[list[int]]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made.append(model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist())
    return made


def test_texts_come_back(chain: dict[str, dict[str, Any]]) -> None:
    from slm.core.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(chain["import"]["home"] / chain["import"]["checkpoint"])
    for text in (" two  spaces\n\n and\ttabs", "naïve 東京 🦊", "<table>\n<tr>", "x" * 50, "١٢٣ \u200bzero"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids[0] == 2
