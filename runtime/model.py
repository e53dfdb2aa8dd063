"""The Python face of a model that answers, whichever backend runs it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.core.tokenizer import TextStream, Tokenizer
from slm.runtime.decoder import Decoder
from slm.runtime.generate import OnFull, Run, generate
from slm.runtime.sampling import Sampling
from slm.runtime.stopping import StopTexts
from slm.runtime.streaming import Piece, stream_pieces


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

    def pieces(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        on_full: OnFull = "stop",
        keep: int | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Returns the continuation of a prompt token by token, each with the text that became certain with it.

        Args:
            prompt: The text to continue, or its token ids.
            max_new_tokens: How many tokens at most.
            stop: A text that ends the continuation and is not part of it, or several.
            logprobs: How many of the likeliest tokens each piece names, besides the log-probability of its own; None leaves
                both out. They are the model's own, whatever the sampling.
            on_full: What to do when the context is full: "stop", or "slide": the older part is forgotten, and the model does
                not see it any longer (`last_run.slides` counts).
            keep: How many tokens at the beginning sliding never forgets; by default those that the tokenizer puts there.
            **sampling: Fields of `slm.runtime.sampling.Sampling`.

        Raises:
            SlmError: Before anything is generated, when the prompt or the sampling will not do.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        stops = StopTexts([stop] if isinstance(stop, str) else stop, self.tokenizer)
        self.last_run, tokens = generate(
            self.decoder,
            ids,
            Sampling(**sampling),
            max_new_tokens,
            self.stop_token_ids,
            logprobs=logprobs,
            on_full=on_full,
            keep=self._begins_with(ids) if keep is None else keep,
        )
        return stream_pieces(self.last_run, tokens, TextStream(self.tokenizer), stops)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """Returns the continuation of a prompt in pieces of text, never half a character; options as for `pieces`."""
        return (piece.text for piece in self.pieces(prompt, **options) if piece.text)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Returns the continuation of a prompt; options as for `pieces`."""
        return "".join(self.stream(prompt, **options))

    def _begins_with(self, ids: Sequence[int]) -> int:
        """Returns how many of the ids are what the tokenizer puts before a text."""
        begins = self.tokenizer.encode("")
        return len(begins) if list(ids[: len(begins)]) == begins else 0
