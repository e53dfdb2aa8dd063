"""The texts of several prompts, taking their steps together where the backend can."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from slm.runtime.batch import batched, generate_batch
from slm.runtime.decoder import Decoder
from slm.runtime.generate import Generated, Run
from slm.runtime.sampling import Sampling
from slm.runtime.streaming import Piece

# Makes pieces of text of a run's tokens.
Stream = Callable[[Run, Generated], Iterator[Piece]]


class _Text:
    """One of several texts, which gets its tokens as they are chosen.

    `stream_pieces` asks for tokens, and a batch hands them out: between the two they wait here, one at a time.
    """

    def __init__(self, run: Run, stream: Stream) -> None:
        self._run = run
        self._waiting: deque[int] = deque()
        self._pieces = stream(run, self._tokens())
        self._made: list[str] = []

    def _tokens(self) -> Generated:
        while self._waiting:
            yield self._waiting.popleft()

    def push(self, token: int) -> bool:
        """Takes a token; says whether a stop text ends the text with it."""
        self._run.tokens.append(token)
        self._waiting.append(token)
        self._made.append(next(self._pieces).text)
        return self._run.stopped == "stop"

    def finish(self, max_new_tokens: int, context: int) -> str:
        """Returns the text, and notes in the run why it ended."""
        self._made += [piece.text for piece in self._pieces]
        run = self._run
        if run.stopped != "stop":
            full = run.prompt_tokens + len(run.tokens) > context
            run.stopped = "length" if len(run.tokens) == max_new_tokens else "context" if full else "end"
        return "".join(self._made)


def generate_texts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    max_new_tokens: int,
    stop: Sequence[int],
    runs: Sequence[Run],
    stream: Stream,
) -> list[str] | None:
    """Continues several prompts, each as it would be continued alone; None where the backend reads one text at a time.

    Args:
        decoder: The model.
        prompts: Token ids of each.
        samplings: How tokens are chosen, for each.
        max_new_tokens: How many at most, for each.
        stop: Tokens that end a text.
        runs: Takes the figures of each; times, which are of all of them together, stay 0.
        stream: Makes text of a run's tokens.
    """
    together = batched(decoder)
    if together is None:
        return None
    texts = [_Text(run, stream) for run in runs]
    generate_batch(
        together, prompts, samplings, max_new_tokens, stop, ended=lambda index, token: texts[index].push(token)
    )
    return [text.finish(max_new_tokens, decoder.context) for text in texts]
