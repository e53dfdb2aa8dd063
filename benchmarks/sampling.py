"""What choosing a token costs, beside transformers' logits processors on the same row.

Logits fall off as words do (Zipf's law, exponent 1.5, with noise), at GPT-2's vocabulary as trained here and at Gemma's. One
thread; ours and theirs take turns, and the median of each is taken. The last line is one JSON object.

usage: OMP_NUM_THREADS=1 python benchmarks/sampling.py [--rounds 200]
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from slm.runtime.logprobs import logprobs_of
from slm.runtime.sampling import GREEDY, Sampler, Sampling

VOCABULARIES = (50_304, 262_144)
HISTORY = 1000
SETTINGS: dict[str, Sampling] = {
    "greedy": GREEDY,
    "default (temperature 0.8, top-k 40, top-p 0.95)": Sampling(seed=0),
    "default and repetition penalty 1.1": Sampling(seed=0, repetition_penalty=1.1),
    "temperature 1 alone": Sampling(1.0, 0, 1.0, seed=0),
    "top-p 0.95 alone": Sampling(1.0, 0, 0.95, seed=0),
    "min-p 0.05 alone": Sampling(1.0, 0, 1.0, seed=0, min_p=0.05),
    "typical 0.9 alone": Sampling(1.0, 0, 1.0, seed=0, typical_p=0.9),
}


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for vocabulary in VOCABULARIES:
        generator = np.random.default_rng(0)
        row = -1.5 * np.log1p(generator.permutation(vocabulary)) + generator.standard_normal(vocabulary)
        logits, prompt = row.astype(np.float32), generator.integers(0, vocabulary, HISTORY).tolist()
        found = figures[str(vocabulary)] = {
            name: timed(
                {"slm_us": ours(sampling, logits, prompt), "transformers_us": theirs(sampling, logits, prompt)}, rounds
            )
            for name, sampling in SETTINGS.items()
        }
        found["logprobs of the token and the top 5"] = timed({"slm_us": lambda: logprobs_of(logits, 7, 5)}, rounds)  # noqa: B023
        for name, medians in found.items():
            print(f"{vocabulary:>7,}  {name:<48}", *(f"{key} {value:>8,.0f}" for key, value in medians.items()))
    print(json.dumps({"rounds": rounds, "history": HISTORY, "figures": figures}))


def timed(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median microseconds of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            begun = time.perf_counter()
            work()
            times[name].append(1e6 * (time.perf_counter() - begun))
    return {name: round(median(each), 1) for name, each in times.items()}


def ours(sampling: Sampling, logits: Any, prompt: list[int]) -> Callable[[], Any]:
    """Returns a choice by slm, with a history."""
    sampler = Sampler(sampling, prompt, logits.size)
    return lambda: sampler.choose(logits)


def theirs(sampling: Sampling, logits: Any, prompt: list[int]) -> Callable[[], Any]:
    """Returns a choice by transformers' processors, as its generate makes it."""
    ids, scores = torch.tensor([prompt]), torch.from_numpy(logits)[None]
    if sampling.temperature == 0:
        return lambda: scores.argmax(-1).item()
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        processors.append(TypicalLogitsWarper(sampling.typical_p))
    return lambda: torch.multinomial(processors(ids, scores).softmax(-1), 1).item()


if __name__ == "__main__":
    main()
