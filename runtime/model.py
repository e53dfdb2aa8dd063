"""The Python interface of a model, whichever backend runs it."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from slm.core.arguments import described, keywords_checked
from slm.core.errors import ArgumentError, SlmError
from slm.core.tokenizer import Tokenizer
from slm.runtime.backend import Decoder
from slm.runtime.generation import Generation, Piece, Request, Result
from slm.runtime.guide import Constraint
from slm.runtime.options import (
    MAX_NEW_TOKENS,
    GenerationOptions,
    check_options,
    sampling_of,
    stop_texts,
    token_ids,
)
from slm.runtime.streaming import Stream, run, texts

if TYPE_CHECKING:
    from slm.core.chat import Message
    from slm.runtime.chat import Chat

# One prompt: a text, or its token ids.
Prompt = str | Sequence[int] | NDArray[np.integer[Any]]
# Several prompts. Not any sequence of str, because a str is one itself.
Prompts = list[str] | tuple[str, ...] | list[list[int]] | tuple[list[int], ...]


@dataclass(frozen=True)
class About:
    """The source of a loaded model.

    Attributes:
        path: The checkpoint or bundle.
        precision: Precision of the weights, such as "float32" or "int8".
        device: The device that the model runs on.
        parameters: The number of parameters; a tied head counts once.
    """

    path: Path
    precision: str
    device: str
    parameters: int


class Model:
    """A model that continues texts; `slm.load` returns one.

        model = slm.load("runs/tiny/onnx-int8")
        text = model.generate("Once upon a time", max_new_tokens=50, seed=1)
        texts = model.generate(["Once", "One day"])
        result = model.complete("Once"); result.tokens, result.stopped, result.seed
        for text in model.stream("The fox"): ...
        chat = model.chat(system="Be brief."); answer = chat.ask("Hi.")

    Use a model from one thread at a time: `generate` and `logits` wait for each other, and a stream that is not finished when
    another text begins ends with an error. Load one model per thread to generate in parallel.

    Attributes:
        tokenizer: Text to ids and back.
        decoder: The backend that computes logits.
        stop_token_ids: Tokens that end a text.
        about: The source of the model; None if a program assembled it.
        declares_tools: Whether prompts declare tools: not if the model was fine-tuned on calls of undeclared tools.
        shown_tokens: Special tokens whose spelling is part of texts; a conversation with tools adds the marks of calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoder: Decoder, stop_token_ids: Sequence[int], about: About | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.stop_token_ids = tuple(stop_token_ids)
        self.about = about
        self.declares_tools = True
        self.shown_tokens: frozenset[int] = frozenset()
        self._lock = threading.RLock()
        self._under_way: object = None  # the text that the decoder is reading

    def __repr__(self) -> str:
        if self.about is None:
            return f"<slm.Model on {self.decoder.description}>"
        about = self.about
        return f"<slm.Model {about.path}: {about.parameters:,} parameters, {about.precision}, {about.device}>"

    def logits(self, ids: Sequence[Sequence[int]] | NDArray[Any]) -> NDArray[np.float32]:
        """Returns the logits, float32 (batch, sequence, vocab), at every position of rows of one length.

        Raises:
            ValueError: If the ids are not integers in a rectangle (batch, sequence), exceed the context, or are outside the
                vocabulary.
        """
        try:
            array = np.asarray(ids)
        except ValueError:
            raise ValueError("ids must have the shape (batch, sequence), with rows of one length") from None
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"ids must have the shape (batch, sequence), not {array.shape}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"ids must be whole numbers, not {array.dtype}")
        if array.shape[1] > self.decoder.context:
            raise ValueError(f"{array.shape[1]:,} tokens do not fit into the context of {self.decoder.context:,}")
        if array.min() < 0 or array.max() >= self.decoder.vocab_size:
            raise ValueError(f"ids must be from 0 to {self.decoder.vocab_size - 1:,}")
        with self._lock:
            return self.decoder.logits(array.astype(np.int64))

    def pieces(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns the completion of a prompt token by token, each with the text that became certain with it.

        Args:
            prompt: A text, or token ids.
            **options: See `slm.GenerationOptions`: temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
                presence_penalty, frequency_penalty, logit_bias, seed, max_new_tokens, stop, on_full, keep, logprobs.

        Returns:
            An iterator; its `result` has the figures, final after the last piece.

        Raises:
            SlmError: Before anything is generated, if the prompt or an option is invalid: an `ArgumentError`, which is also a
                `TypeError`, for an unknown option or a wrong type. Later, if another text was started on this model.
        """
        check_options("pieces", options)
        return self._begin(prompt, options)

    def constrained(
        self, prompt: Prompt, constraint: Constraint, **options: Unpack[GenerationOptions]
    ) -> Stream[Piece]:
        """Returns a completion that follows a grammar; otherwise like `pieces`.

        Args:
            prompt: A text, or token ids.
            constraint: The grammar, for this completion only.
            **options: As for `pieces`.
        """
        check_options("constrained", options)
        return self._begin(prompt, options, constraint)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Stream[str]:
        """Returns the completion of a prompt in pieces of text, each of whole characters; otherwise like `pieces`."""
        check_options("stream", options)
        return texts(self._begin(prompt, options))

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> str: ...

    @overload
    def generate(self, prompt: Prompts, **options: Unpack[GenerationOptions]) -> list[str]: ...

    def generate(self, prompt: Prompt | Prompts, **options: Unpack[GenerationOptions]) -> str | list[str]:
        """Returns the completion of a prompt, or a list of completions for a list of prompts; see `complete`."""
        check_options("generate", options)
        completed = self._complete(prompt, options)
        return [each.text for each in completed] if isinstance(completed, list) else completed.text

    @overload
    def complete(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Result: ...

    @overload
    def complete(self, prompt: Prompts, **options: Unpack[GenerationOptions]) -> list[Result]: ...

    def complete(self, prompt: Prompt | Prompts, **options: Unpack[GenerationOptions]) -> Result | list[Result]:
        """Returns the completion of a prompt with its tokens and figures, or a list of these for a list of prompts.

        Result i of several is the result of `complete(prompts[i], seed=seed + i)`. A fused bundle steps all prompts together
        (`slm.runtime.scheduler`). Other models, drafts, `on_full="slide"` and `logprobs` run the prompts one by one.

        Args:
            prompt: A text or token ids; or a list of texts or of lists of ids.
            **options: As for `pieces`.

        Raises:
            SlmError: As for `pieces`; for several prompts, the message names the invalid one.
        """
        check_options("complete", options)
        return self._complete(prompt, options)

    @keywords_checked
    def chat(
        self,
        system: str = "",
        *,
        messages: "Sequence[Message]" = (),
        seed: int | None = None,
        tools: "Sequence[Callable[..., Any] | Mapping[str, Any]]" = (),
        tool_choice: str = "auto",
    ) -> "Chat":
        """Begins a conversation: `chat.ask("Hi.")` returns an answer, `chat.stream` yields it as it is generated.

        From now on the model caches the tokens that it read, so that the next turn does not read earlier turns again.

        Args:
            system: The system message; empty for none.
            messages: Earlier messages, oldest first, each {"role": "user" or "assistant", "content": text}.
            seed: The same seed gives the same answers to the same requests. None draws a seed; `chat.seed` has it.
            tools: Functions with type hints and docstrings, which `chat.ask` calls when the model asks for it, or declarations
                in OpenAI's format, whose calls `chat.calls` has.
            tool_choice: "auto": an answer may call tools; "required", or the name of a tool: it must; "none": it must not.
                The answer that follows results may always be text. Calls follow the schemas of the tools if llguidance is
                installed.

        Raises:
            SlmError: If the model has no chat template, the messages are not a conversation, a tool cannot be declared, or the
                choice does not fit the tools or needs llguidance.
        """
        from slm.runtime.chat import Chat
        from slm.runtime.functions import Toolbox

        return Chat(
            self,
            system,
            messages=messages,
            seed=seed,
            tools=Toolbox.of(tools) if tools else None,
            tool_choice=tool_choice,
        )

    def _generation(
        self,
        prompt: Any,
        options: GenerationOptions,
        seed: int | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Checks the arguments and returns the generation of one text; computes nothing."""
        ids, keep = self._ids(prompt), options.get("keep")
        request = Request(
            prompt=ids,
            sampling=sampling_of(options if seed is None else {**options, "seed": seed}),
            max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
            stop_tokens=frozenset(self.stop_token_ids),
            stop=stop_texts(options),
            logprobs=options.get("logprobs"),
            on_full=options.get("on_full", "stop"),
            keep=self._begins_with(ids) if keep is None else keep,
            constraint=constraint,
            shown=self.shown_tokens,
        )
        return Generation(request, self.decoder.context, self.decoder.vocab_size, self.tokenizer)

    def _begin(self, prompt: Any, options: GenerationOptions, constraint: Constraint | None = None) -> Stream[Piece]:
        generation = self._generation(prompt, options, constraint=constraint)
        pieces = run(self.decoder, generation)
        return pieces.through(self._alone(pieces))

    def _alone(self, pieces: Stream[Piece]) -> Generator[Piece, None, None]:
        """Yields pieces until another text is started on the same decoder."""
        mine = object()
        with closing(pieces):
            with self._lock:
                self._under_way = mine
                piece = next(pieces, None)
            while piece is not None:
                yield piece
                with self._lock:
                    if self._under_way is not mine:
                        raise SlmError(
                            "another text was begun with this model before this one ended",
                            "finish one text before the next, or load the model once for each",
                        )
                    piece = next(pieces, None)

    def _complete(self, prompt: Any, options: GenerationOptions) -> Result | list[Result]:
        from slm.runtime.scheduler import batched, run_batch

        if _is_one(prompt):
            with self._lock:
                return self._begin(prompt, options).finish()
        seed = sampling_of(options).seed  # the seed of the first prompt; the others count up from it
        generations = []
        for number, each in enumerate(prompt):
            try:
                generations.append(self._generation(each, options, None if seed is None else seed + number))
            except SlmError as error:
                message = f"prompt {number + 1} of {len(prompt)}: {error.message}"
                raise type(error)(message, error.hint) from None
        with self._lock:
            if batched(self.decoder, generations) is None:  # generations run on the decoder one after the other
                self._under_way = None
            return run_batch(self.decoder, generations)

    def _ids(self, prompt: Any) -> list[int]:
        """Returns the token ids of one prompt.

        Raises:
            ArgumentError: If it is neither a text nor token ids.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not _is_one(prompt):
            raise ArgumentError("the prompt is a list of prompts", "generate takes several at once")
        return token_ids(prompt)

    def _begins_with(self, ids: Sequence[int]) -> int:
        """Returns how many of the ids are the prefix that the tokenizer adds to a text."""
        begins = self.tokenizer.prefix_ids
        return len(begins) if tuple(ids[: len(begins)]) == begins else 0


def _is_one(prompt: object) -> bool:
    """Returns whether an argument is one prompt, rather than several.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, bytes | bytearray):
        raise ArgumentError("the prompt is bytes", "decode it: prompt.decode()")
    if isinstance(prompt, np.ndarray):
        if prompt.ndim not in (1, 2) or prompt.dtype.kind not in "iu":
            raise ArgumentError(f"the prompt is an array of {prompt.dtype} with {prompt.ndim} dimensions", _WANTED)
        return prompt.ndim == 1
    if not isinstance(prompt, Sequence):
        raise ArgumentError(f"the prompt is {described(prompt)}", _WANTED)
    return not prompt or not isinstance(prompt[0], str | bytes | Sequence | np.ndarray)


_WANTED = "a prompt is a str or a list of token ids; several are a list of them"
