"""When a step may read a head in halves (`slm.export.graph.halves`), and how a step asks for the whole head.

A step of one row reads the upper halves of the table: the logits of its most likely tokens are exact, and the others are
approximate. This changes no choice among the exact tokens. Whatever looks at other tokens asks for the whole head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from slm.core.contract import head_candidates
from slm.core.manifest import Bundle
from slm.runtime.sampling import Sampling

# The input `num_logits_to_keep` with which a step of one row reads the whole head. A single token has no second position.
WHOLE = 2
# The part of the candidates that the most likely tokens are among, with a large margin: at 2,048 positions of Gemma 3 270M, the
# most likely token was always among the first 10 candidates of 1,280.
_SURE = 4


def in_halves(bundle: Bundle) -> bool:
    """Returns whether a bundle has a head in halves."""
    quantization = bundle.manifest.quantization
    return quantization is not None and any(scheme.halves for scheme in quantization.schemes.values())


def looks_far(sampling: Sampling, vocab_size: int) -> bool:
    """Returns whether a choice depends on the logits of unlikely tokens.

    Greedy decoding and sampling from a small top-k look at likely tokens only, whose logits are exact. A bias or a penalty can
    make any token likely.
    """
    plain = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    few = sampling.temperature == 0 or 0 < sampling.top_k <= head_candidates(vocab_size) // _SURE
    return bool(sampling.logit_bias) or not plain or not few


class _TwoWays(Protocol):
    whole_head: bool

    def read(self, ids: Sequence[int]) -> NDArray[Any]: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...


def both_ways(decoder: _TwoWays, ids: Sequence[int]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Reads tokens one by one, and yields the logits (V,) after each: from halves, and from the whole head."""
    for token in ids:
        before = decoder.snapshot()
        whole = decoder.read([token]).copy()
        decoder.restore(before)
        decoder.whole_head = False
        try:
            halves = decoder.read([token])
        finally:
            decoder.whole_head = True
        yield halves, whole


def read_whole(decoder: object, whole: bool) -> None:
    """Sets whether the next steps of a decoder, or of the decoder inside wrappers, read the whole head."""
    while (inner := getattr(decoder, "decoder", None)) is not None:
        decoder = inner
    if hasattr(decoder, "whole_head"):
        decoder.whole_head = whole
