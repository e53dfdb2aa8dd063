"""Tokens as they are chosen, with their text and how likely they were."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from slm.core.tokenizer import TextStream
from slm.runtime.generate import Generated, Run
from slm.runtime.stopping import StopTexts
from slm.runtime.token_bytes import token_bytes


@dataclass(frozen=True)
class Piece:
    """A token, and the text that became certain with it.

    The texts of all pieces are the whole text. One is empty while a character is incomplete, or a stop text may have begun.

    Attributes:
        text: Whole characters; those that earlier tokens began come with the one that completes them.
        token: The token; None in a last piece, for text that was held back when the text ended.
        logprob: The natural logarithm of its probability in the model's own distribution, before bias, penalties,
            temperature and all else in `Sampling`; None unless asked for.
        top: The likeliest tokens there, with theirs, likeliest first; as many as were asked for.
        raw: The token's own bytes, also where it is part of a character; of a special token, those of its spelling.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    raw: bytes = b""


def stream_pieces(run: Run, tokens: Generated, text: TextStream, stops: StopTexts) -> Iterator[Piece]:
    """Yields a piece for each token, and one more when text was still held back; on Ctrl-C too, before it goes on its way.

    Args:
        run: The run of the tokens; it is told when a stop text ends it.
        tokens: The new tokens as they come.
        text: Makes text of them.
        stops: Texts that end the text and are not part of it.
    """
    own = token_bytes(text.tokenizer)
    with closing(tokens):
        try:
            for token in tokens:
                raw = own.at(token, first=not text.begun)
                piece = stops.push(text.push(token), token)
                if stops.found:
                    run.stopped = "stop"
                if run.logprobs:
                    yield Piece(piece, token, run.logprobs[-1].chosen, run.logprobs[-1].top, raw)
                else:
                    yield Piece(piece, token, raw=raw)
                if stops.found:
                    return
        except KeyboardInterrupt:
            yield from _rest(run, text, stops)
            raise
        yield from _rest(run, text, stops)


def _rest(run: Run, text: TextStream, stops: StopTexts) -> Iterator[Piece]:
    rest = stops.push(text.finish()) + stops.finish()
    if stops.found:
        run.stopped = "stop"
    if rest:
        yield Piece(rest)
