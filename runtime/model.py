"""The Python face of a model that answers, whichever backend runs it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.tokenizer import Tokenizer
from slm.runtime.decoder import Decoder
from slm.runtime.generate import Run, generate
from slm.runtime.sampling import Sampling


class Model:
    """A tokenizer and a decoder: what `slm.load` returns.

    Attributes:
        tokenizer: Text to ids and back.
        decoder: The backend.
        stop_token_ids: Tokens that end a text.
        last_run: Figures of the text generated last, None before the first.
    """

    def __init__(self, tokenizer: Tokenizer, decoder: Decoder, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.stop_token_ids = tuple(stop_token_ids)
        self.last_run: Run | None = None

    def logits(self, ids: Sequence[Sequence[int]] | NDArray[Any]) -> NDArray[np.float32]:
        """Returns the logits, float32 (batch, sequence, vocab), at every position of rows of one length.

        Raises:
            ValueError: When the ids are not a rectangle (batch, sequence), longer than the context, or not in the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"ids must have the shape (batch, sequence), not {array.shape}")
        if array.shape[1] > self.decoder.context:
            raise ValueError(f"{array.shape[1]:,} tokens do not fit into the context of {self.decoder.context:,}")
        if array.min() < 0 or array.max() >= self.decoder.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.decoder.vocab_size - 1:,}")
        return self.decoder.logits(array)

    def stream(self, prompt: str | Sequence[int], *, max_new_tokens: int = 256, **sampling: Any) -> Iterator[str]:
        """Returns the continuation of a prompt piece by piece, never half a character.

        Args:
            prompt: The text to continue, or its token ids.
            max_new_tokens: How many tokens at most.
            **sampling: Fields of `slm.runtime.sampling.Sampling`.

        Raises:
            SlmError: Before anything is generated, when the prompt or the sampling will not do.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.last_run, tokens = generate(self.decoder, ids, Sampling(**sampling), max_new_tokens, self.stop_token_ids)
        return self.tokenizer.stream(tokens)

    def generate(self, prompt: str | Sequence[int], *, max_new_tokens: int = 256, **sampling: Any) -> str:
        """Returns the continuation of a prompt; see `stream`."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, **sampling))
