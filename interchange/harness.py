"""The model interface of lm-evaluation-harness (lm_eval.api.model, 0.4.13), for checkpoints and bundles."""

import logging
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from slm.core.errors import SlmError
from slm.core.progress import Progress, Silent
from slm.runtime.answers import end_of_text
from slm.runtime.evaluate import score
from slm.runtime.generation import Generation, Request
from slm.runtime.model import Model
from slm.runtime.sampling import Sampling
from slm.runtime.streaming import run

# Rows scored together, sorted by length.
_POOL = 256
# Default number of new tokens, which is also the harness's.
_MAX_NEW_TOKENS = 256
# Bootstrap samples for the standard error of metrics without a formula.
_BOOTSTRAPS = 1000


class HarnessModel(TemplateLM):
    """Answers the three kinds of requests; splits contexts and continuations like the harness's other models."""

    def __init__(self, model: Model, progress: Progress | None = None) -> None:
        super().__init__()
        self.model = model
        self.progress = progress or Silent()
        end = end_of_text(model.tokenizer, model.stop_token_ids)
        marks = [*model.tokenizer.prefix_ids[-1:], *([] if end is None else [end])]
        if not marks:
            raise SlmError("tasks need a token that begins or ends a text, and the model has none")
        self._prefix, self._end = marks[0], marks[-1]

    @property
    def max_length(self) -> int:
        """Maximum context, in tokens."""
        return self.model.decoder.context

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that precedes a text without context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer, for caches."""
        return self.model.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns ids, with special tokens as spelled; the prefix tokens precede them unless they are there or disabled."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode_rendered(string)
        begins = list(tokenizer.prefix_ids)
        spelt = add_special_tokens is None and ids[: len(begins)] == begins
        return ids if add_special_tokens is False or spelt else begins + ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation after its context, and whether greedy choice would write it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=True
        )  # slm draws its own progress bar
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation after its context, and whether greedy choice would write it."""
        answers: list[tuple[float, bool]] = []
        remaining = iter(requests)
        self.progress.start("log-likelihoods", len(requests), "requests")
        try:
            while pool := list(islice(remaining, _POOL)):
                rows = [np.array(self._fitting(before, after), np.int64) for _, before, after in pool]
                for (key, _, after), (likely, likeliest) in zip(pool, score(self.model.decoder, rows), strict=True):
                    first = len(likely) - len(after)
                    answer = float(likely[first:].sum(dtype=np.float64)), bool(likeliest[first:].all())
                    answers.append(answer)
                    if key is not None:  # the harness's cache of answers
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    self.progress.advance()
        finally:
            self.progress.finish()
        return answers

    def _fitting(self, before: list[int], after: list[int]) -> list[int]:
        """Returns the ids cut on the left to the context, plus one: the last id is predicted and not read.

        Raises:
            SlmError: When the continuation alone does not fit, or the model has no such id.
        """
        ids = (before + after)[-(self.max_length + 1) :]
        if len(ids) <= len(after):
            raise SlmError(f"a continuation of {len(after):,} tokens does not fit the context of {self.max_length:,}")
        if max(ids) >= self.model.decoder.vocab_size:
            raise SlmError(f"the task's text has a token of id {max(ids):,}, which the model does not have")
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts, cut into the harness's disjoint windows, without end-of-text.

        The prefix token precedes only the first window of a text.
        """
        pieces: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                pieces.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = np.zeros(len(requests))
        for number, (likely, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            sums[number] += likely
        answers = [float(value) for value in sums]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to the first stop sequence, greedily unless a task asks for sampling."""
        answers = []
        self.progress.start("texts", len(requests), "requests")
        try:
            for number, request in enumerate(requests):
                context, options = request.args
                # A separate seed per request: a task that repeats a request wants different answers.
                answer = self._continue(context, normalize_gen_kwargs(options, _MAX_NEW_TOKENS), number)
                answers.append(answer)
                self.cache_hook.add_partial("generate_until", request.args, answer)
                self.progress.advance()
        finally:
            self.progress.finish()
        return answers

    def _continue(self, context: str, options: Any, seed: int) -> str:
        model = self.model
        limit = int(options["max_gen_toks"])
        room = self.max_length - limit
        if room < 1:
            raise SlmError(f"a task asks for {limit:,} new tokens, and the context is {self.max_length:,}")
        until = [stop for stop in handle_stop_sequences(options["until"], eos=None) if stop]
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        sampling = Sampling(temperature, options.get("top_k", 0), options.get("top_p", 1.0), seed)
        ids = self.tok_encode(context)[-room:]
        stops = {self.eot_token_id, *model.stop_token_ids}
        request = Request(ids, sampling, limit, stops, until)
        generation = Generation(request, model.decoder.context, model.decoder.vocab_size, model.tokenizer)
        return run(model.decoder, generation).finish().text


def run_tasks(
    model: Model, tasks: Sequence[str], *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Runs tasks of lm-evaluation-harness with its default numbers of few-shot examples and its seeds.

    Args:
        model: The model.
        tasks: Names of tasks, or paths of task files (YAML).
        limit: Maximum examples per task.
        progress: Receives the number of requests done.

    Returns:
        For each task: `version`, `examples`, `shots`, `metrics` by name (a filter other than "none" after a comma) and
        `stderr` by the same names.

    Raises:
        SlmError: When a task is unknown, or its data is not available.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    for name in tasks:
        if not (Path(name).is_file() or name in manager.all_tasks):
            raise SlmError(f"no task called {name}", "lm-eval ls tasks lists them; a task file is named with its path")
    # Like lm_eval.simple_evaluate, but without calling git and without querying the machine through PyTorch.
    try:
        loaded = manager.load(list(tasks))
    except (OSError, KeyError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SlmError(f"a task cannot be loaded ({first})", "most take their data from the Hugging Face hub") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    answering = HarnessModel(model, progress)
    results = evaluate(answering, loaded, limit=limit, log_samples=False, bootstrap_iters=_BOOTSTRAPS)
    return {name: _figures(name, results) for name in results["results"]}


def _figures(name: str, results: Any) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        kept = stderr if metric.endswith("_stderr") else metrics
        label = metric.removesuffix("_stderr")
        kept[label if filtered == "none" else f"{label},{filtered}"] = float(value)
    return {
        "version": results["versions"].get(name),
        "examples": results["n-samples"].get(name, {}).get("effective"),
        "shots": results["n-shot"].get(name),
        "metrics": metrics,
        "stderr": stderr,
    }
