"""Writes down what every way to generate gives: run it before and after a change that must not alter any text.

    python benchmarks/goldens.py before.json [MODEL ...]
    python benchmarks/goldens.py after.json [MODEL ...] --against before.json

Texts, tokens, log-probabilities, finish reasons and token counts of: one text with each group of options, a list of texts,
drafts, a chat, and the server's engine with several requests at once (where rows of a batch give the same bits as a row alone).
Default: the model that ships. The files depend on the processor; compare only those of one machine. When two files differ, the
script prints the names of the differences and exits with 1.
"""

import argparse
import json
import sys
from pathlib import Path
from queue import Queue
from typing import Any

import slm
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.generation import Piece, Request, Result
from slm.runtime.sampling import GREEDY, Sampling
from slm.runtime.shipped import model_path
from slm.serve.engine import Engine

PROMPTS = ["Once upon a time", "The fox", "One day a big red dog saw", "The red cat and the red dog saw a red cat."]
OPTIONS: dict[str, slm.GenerationOptions] = {
    "greedy": {"temperature": 0, "max_new_tokens": 60},
    "sampled": {"seed": 5, "temperature": 1.4, "top_k": 0, "min_p": 0.02, "typical_p": 0.95, "max_new_tokens": 60},
    "penalties": {"seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {9: 3.0}},
    "stop": {"seed": 2, "stop": ["e", " the", "."], "logprobs": 2},
    "slide": {"seed": 4, "max_new_tokens": 600, "on_full": "slide", "keep": 5},
}


def figures(result: Result) -> dict[str, Any]:
    """Returns what must stay the same of a result: everything but times."""
    logprobs = [[each.chosen, *each.top] for each in result.logprobs]
    names = ("text", "tokens", "stopped", "prompt_tokens", "reused_tokens", "seed", "slides", "steps", "error")
    return {name: getattr(result, name) for name in names} | {"logprobs": logprobs}


def served(model: slm.Model) -> list[dict[str, Any]]:
    """Returns the results of requests that an engine runs together, the first two of which share a long beginning."""
    assert isinstance(model.decoder, OnnxDecoder)
    engine, results = Engine(model.decoder, model.tokenizer, slots=3, prefill_tokens=24), []
    ends: Queue[tuple[int, Result]] = Queue()
    prompts = ["Tom has a red ball. " * 20, "Tom has a red ball. " * 20 + "He", *PROMPTS]

    def submit(number: int) -> None:
        def deliver(event: Piece | Result) -> None:
            if isinstance(event, Result):
                ends.put((number, event))

        sampling = GREEDY if number % 2 else Sampling(seed=number)
        ids = model.tokenizer.encode(prompts[number])[-model.decoder.context // 2 :]
        engine.submit(Request(ids, sampling, 40, model.stop_token_ids, stop=["dog"], logprobs=number % 3), deliver)

    submit(0)
    results.append(ends.get())  # before the second, which then reuses its prompt
    for number in range(1, len(prompts)):
        submit(number)
    results += [ends.get() for _ in prompts[1:]]
    engine.close()
    return [figures(result) for _, result in sorted(results, key=lambda each: each[0])]


def goldens(path: Path) -> dict[str, Any]:
    """Returns everything that one model generates, by name."""
    found: dict[str, Any] = {}
    model, drafting = slm.load(path, threads=1), slm.load(path, threads=1, draft_tokens=6)
    for name, options in OPTIONS.items():
        streams = [model.pieces(prompt, **options) for prompt in PROMPTS]
        for prompt, stream in zip(PROMPTS, streams, strict=True):
            found[f"{name}/{prompt}"] = [[piece.text, piece.raw.hex()] for piece in stream], figures(stream.result)
        found[f"{name}/list"] = [figures(each) for each in model.complete(PROMPTS, **options)]
        found[f"{name}/drafts"] = [figures(each) for each in drafting.complete(PROMPTS, **options)]
    if _same_in_a_batch(model):
        found["engine"] = served(slm.load(path, threads=1))
    chat = model.chat("Be brief.", seed=1)
    found["chat"] = [chat.ask(text, max_new_tokens=30) for text in ("Hi.", "A story?", "And then?")], chat.retry()
    return found


def _same_in_a_batch(model: slm.Model) -> bool:
    decoder = model.decoder
    if not isinstance(decoder, OnnxDecoder) or decoder.bundle.manifest.target == "portable":
        return False
    return decoder.steps_alike or decoder.bundle.manifest.quantization is None


def main() -> None:
    """Writes the file, and compares it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="*", default=[model_path()])
    parser.add_argument("--against", type=Path, help="an earlier file")
    args = parser.parse_args()
    found = {f"{path}/{name}": value for path in args.models for name, value in goldens(path).items()}
    args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(found)} goldens in {args.out}")
    if args.against is not None:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (args.against, args.out))
        different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        print("\n".join(["identical"] if not different else [f"different: {name}" for name in different]))
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
