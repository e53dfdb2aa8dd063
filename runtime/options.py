"""The keyword arguments of `Model.generate`, `complete`, `stream`, `pieces` and of chats: names, types, checks."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypedDict

import numpy as np

from slm.core.arguments import check_keywords, check_type
from slm.core.errors import ArgumentError
from slm.runtime.generation import OnFull
from slm.runtime.sampling import Sampling


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen: the fields of `slm.runtime.sampling.Sampling`, which defines the defaults.

    Attributes:
        temperature: Divides the logits; 0 is greedy. Default 0.8.
        top_k: Keep this many of the most likely tokens; 0 keeps all. Default 40.
        top_p: Keep the fewest most likely tokens whose total probability reaches this. Default 0.95; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one. Default 0.
        typical_p: Keep the fewest tokens closest to the expected surprise. Default 1 keeps all.
        repetition_penalty: Above 1 makes tokens of the prompt and the text less likely. Default 1.
        presence_penalty: Subtracted once from the logit of each new token used so far. Default 0.
        frequency_penalty: Subtracted from the logit of a new token for each use so far. Default 0.
        logit_bias: Added to the logits of these token ids; -inf excludes one.
        seed: The same seed gives the same text. None, the default, draws one; `Result.seed` has it.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


class GenerationOptions(SamplingOptions, total=False):
    """How the next token is chosen, and where a text ends.

    Attributes:
        max_new_tokens: The most new tokens. Default 256.
        stop: One or several texts that end the completion. The completion does not include them.
        on_full: What to do when the context is full: "stop", the default, or "slide", which drops the older part; the
            model no longer sees it (`Result.slides` counts).
        keep: Tokens at the beginning that sliding never drops. Default: those that the tokenizer puts there.
        logprobs: How many of the most likely tokens each `Piece` and `Result.logprobs` has, besides the log-probability of
            the chosen token. They are the model's own, independent of the sampling. Default None: no log-probabilities.
    """

    max_new_tokens: int
    stop: str | Sequence[str] | None
    on_full: OnFull
    keep: int | None
    logprobs: int | None


OPTION_NAMES = frozenset(GenerationOptions.__annotations__)
_SAMPLING_NAMES = frozenset(SamplingOptions.__annotations__)
MAX_NEW_TOKENS = 256


def check_options(function: str, options: GenerationOptions) -> None:
    """Checks the names of options, and the types that `Sampling` does not check.

    Args:
        function: The called function, for the message.
        options: Its keyword arguments.

    Raises:
        ArgumentError: If a name is unknown or a value has the wrong type.
    """
    check_keywords(function, options, OPTION_NAMES)
    check_type("max_new_tokens", options.get("max_new_tokens", MAX_NEW_TOKENS), Integral, "a whole number")
    for name in ("keep", "logprobs"):
        check_type(name, options.get(name), (Integral, type(None)), "a whole number or None")
    stop_texts(options)


def sampling_of(options: GenerationOptions) -> Sampling:
    """Returns the sampling settings of the options.

    Raises:
        SlmError: If a value is out of range or has the wrong type.
    """
    return Sampling(**{name: value for name, value in options.items() if name in _SAMPLING_NAMES})  # type: ignore[arg-type]


def stop_texts(options: GenerationOptions) -> list[str]:
    """Returns the stop texts of the options.

    Raises:
        ArgumentError: If one is not a text.
    """
    stop = options.get("stop")
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) else stop
    check_type("stop", stops, (list, tuple, set, frozenset), "a text or a list of texts")
    for each in stops:
        check_type("a stop text", each, str, "a str")
    return list(stops)


def token_ids(prompt: Sequence[object]) -> list[int]:
    """Returns token ids as ints.

    Raises:
        ArgumentError: If an element is not an integer.
    """
    for each in prompt:
        if isinstance(each, bool) or not isinstance(each, int | np.integer):
            raise ArgumentError(
                f"the prompt is a list with {type(each).__name__} in it",
                "token ids are whole numbers; a prompt may be a str",
            )
    return [int(each) for each in prompt]  # type: ignore[call-overload]  # which is checked now
