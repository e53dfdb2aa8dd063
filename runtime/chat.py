"""A conversation with a model. Every request contains the whole conversation, in the turn format of the model's template."""

from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Unpack, cast

from slm.core.arguments import check_type
from slm.core.chat import Message, chat_ids, foreign_template, tool_form, turn_ends
from slm.core.errors import ArgumentError, SlmError
from slm.core.tool_fields import called, matched
from slm.core.tools import JSON_STYLE, Call, ordered, parsed_calls
from slm.runtime.generation import Piece
from slm.runtime.guide import Constraint
from slm.runtime.model import Model
from slm.runtime.options import MAX_NEW_TOKENS, GenerationOptions, check_options
from slm.runtime.prefix import PrefixCache, PrefixDecoder
from slm.runtime.sampling import Sampling
from slm.runtime.speculative import SpeculativeDecoder
from slm.runtime.streaming import Stream, texts
from slm.runtime.tool_choice import CallGrammar, can_constrain, check_choice

if TYPE_CHECKING:
    from slm.runtime.functions import Toolbox

# How often an answer may call functions before it must be text.
MOST_ROUNDS = 8
# Memory for snapshots of prompts, so that retrying a turn does not read the prompt again.
_SNAPSHOT_BYTES = 64 << 20
# A quarter of the context is kept free for the completion, if `max_new_tokens` is that large.
_LEAST_ROOM = 4


class Chat:
    """A conversation with a model; `Model.chat` returns one.

        chat = model.chat(system="Be brief.")
        print(chat.ask("Name a colour.", max_new_tokens=20))
        for text in chat.stream("Another?"): print(text, end="")

    Attributes:
        messages: All messages, oldest first, a system message at the beginning.
        forgotten: Exchanges dropped from the beginning because they no longer fit into the context, since the last reset.
        seed: Seed of the conversation; answer n is sampled with seed + n, counted from 0.
        style: The format in which answers spell calls.
        unconstrained: Why calls are not constrained to the schemas of the tools; empty if they are, or without tools.
    """

    def __init__(
        self,
        model: Model,
        system: str = "",
        *,
        messages: Sequence[Message] = (),
        seed: int | None = None,
        draft_tokens: int | None = None,
        tools: "Toolbox | None" = None,
        tool_choice: str = "auto",
    ) -> None:
        """Begins a conversation.

        Args:
            model: The model. From now on its decoder reuses the tokens of the previous turns.
            system: The system message; empty for none.
            messages: Earlier messages, oldest first. A system message at the beginning replaces `system`.
            seed: Seed of the conversation; None draws one.
            draft_tokens: The longest draft of prompt-lookup decoding; None disables drafts.
            tools: The tools that the model may call; None for none.
            tool_choice: "auto": an answer may call tools; "required", or the name of a tool: it must; "none": it must not.
                The answer that follows results may always be text. If llguidance is installed, calls follow the schemas of
                the tools.

        Raises:
            SlmError: If the model has no turns, the choice does not fit the tools or needs llguidance, or the messages are not
                a conversation that a request can follow.
        """
        check_type("system", system, str, "a str")
        check_type("tool_choice", tool_choice, str, "a str")
        check_choice(tool_choice, () if tools is None else tools.tools)
        if tool_choice == "none":
            tools = None
        drawn = Sampling(seed=seed).seed
        assert drawn is not None
        self._model = model
        self.seed = drawn
        self._asked = 0
        self._answering: Stream[Piece] | None = None
        self._cut: list[Message] = []
        self.messages: list[Message] = []
        decoder = model.decoder
        # restores the state that the decoder had before another conversation used it
        if not isinstance(decoder, PrefixDecoder):
            decoder = PrefixDecoder(decoder, PrefixCache(_SNAPSHOT_BYTES))
        model.decoder = decoder if draft_tokens is None else SpeculativeDecoder(decoder, draft_tokens)
        self._tools = () if tools is None else tools.tools
        self._functions = {} if tools is None else tools.functions
        ends = turn_ends(model.tokenizer) - set(model.stop_token_ids)
        model.stop_token_ids = (*model.stop_token_ids, *sorted(ends))
        self.style = JSON_STYLE
        if self._tools:
            self.style = tool_form(model.tokenizer).style
            model.shown_tokens = model.tokenizer.ids_of(self.style.marks) & model.tokenizer.special_ids
        self.unconstrained = ""
        self._choice, self._grammar = tool_choice, self._call_grammar(tool_choice) if self._tools else None
        if foreign_template(model.tokenizer) is None:
            chat_ids(model.tokenizer, [])  # raises if the model has no turns
        before = _checked(messages)
        if before and before[0]["role"] == "system":
            system = before.pop(0)["content"]
        self.reset(system)
        self.messages += before

    def __repr__(self) -> str:
        return f"<slm.Chat of {len(self.messages)} messages with {self._model!r}>"

    def reset(self, system: str | None = None) -> None:
        """Begins a new conversation. The system message stays unless `system` is given; an empty one removes it."""
        if system is None:
            system = self.system
        self._settle()
        self.messages = [{"role": "system", "content": system}] if system.strip() else []
        self.forgotten = 0

    @property
    def system(self) -> str:
        """The system message; empty if there is none."""
        begins = self.messages[:1]
        return begins[0]["content"] if begins and begins[0]["role"] == "system" else ""

    @property
    def calls(self) -> Sequence[Call]:
        """The calls of the last answer, if they have no results yet."""
        return self.messages[-1].get("calls", ()) if self.messages else ()

    def ask(self, request: str, **options: Unpack[GenerationOptions]) -> str:
        """Returns the answer to a request; see `pieces`.

        Calls of functions are made, and the model continues with their results, up to eight times. If an answer calls a tool
        that is not a function, `calls` has its calls, and `answer_calls` takes their results.
        """
        check_options("ask", options)
        return self._completed(self.pieces(request, **options), options)

    def answer_calls(self, results: Sequence[str], **options: Unpack[GenerationOptions]) -> str:
        """Takes the results of `calls`, in their order, and returns the answer that follows; see `ask`.

        Raises:
            SlmError: If there are no calls, or not one result for each.
        """
        check_options("answer_calls", options)
        return self._completed(self.result_pieces(results, **options), options)

    def _completed(self, pieces: Stream[Piece], options: GenerationOptions) -> str:
        """Returns the text of an answer, after its calls of functions."""
        text = "".join(piece.text for piece in pieces).strip()
        for _ in range(MOST_ROUNDS):
            if not self.calls or any(call.name not in self._functions for call in self.calls):
                break
            text = "".join(piece.text for piece in self.result_pieces(self.called(), **options)).strip()
        return self.messages[-1]["content"] if self._tools and text else text  # an empty answer is not in `messages`

    def called(self) -> list[str]:
        """Makes the calls of the last answer, and returns their results. A function's error is a result too.

        Raises:
            SlmError: If a called tool is not a function.
        """
        unknown = next((call.name for call in self.calls if call.name not in self._functions), None)
        if unknown is not None:
            raise SlmError(f"{unknown} is declared, but there is no function for it", "pass its result to answer_calls")
        return [self._functions[call.name].result(call) for call in self.calls]

    def stream(self, request: str, **options: Unpack[GenerationOptions]) -> Stream[str]:
        """Returns the answer to a request as a stream of text; see `pieces`."""
        check_options("stream", options)
        return texts(self.pieces(request, **options))

    def retry(self, **options: Unpack[GenerationOptions]) -> str:
        """Replaces the last answer with another one and returns it; see `ask`."""
        check_options("retry", options)
        return self._completed(self.retry_pieces(**options), options)

    def pieces(self, request: str, **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns the answer token by token. The answer joins the conversation when the iterator ends or is closed.

        Drops the oldest exchanges if the context is too short for the conversation and an answer.

        Args:
            request: The user's message.
            **options: See `slm.GenerationOptions`; a `seed` overrides the conversation's seed.

        Raises:
            SlmError: If the request is empty or too long, or an option is invalid. The conversation is unchanged then.
        """
        check_options("pieces", options)
        check_type("the request", request, str, "a str")
        if not request.strip():
            raise SlmError("the request is empty", "enter a message")
        self._settle()
        return self._next([{"role": "user", "content": request}], options)

    def result_pieces(self, results: Sequence[str], **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns the answer that follows after the results of `calls`, token by token; see `pieces`.

        Raises:
            SlmError: If there are no calls, or not one result for each.
        """
        check_options("result_pieces", options)
        self._close()
        calls = self.calls
        if len(results) != len(calls) or not calls:
            raise SlmError(
                f"the last answer has {len(calls)} calls, and {len(results)} results are given",
                "pass one result for each of chat.calls, in their order",
            )
        for each in results:
            check_type("a result", each, str, "a str")
        told: list[Message] = [
            {"role": "tool", "name": call.name, "content": result} for call, result in zip(calls, results, strict=True)
        ]
        return self._next(told, options)

    def _next(self, messages: Sequence[Message], options: GenerationOptions) -> Stream[Piece]:
        """Returns the answer to further messages; if it cannot begin, the conversation is unchanged."""
        before, forgotten = list(self.messages), self.forgotten
        self.messages += messages
        try:
            ids = self._ids(options.get("max_new_tokens", MAX_NEW_TOKENS))
            seed = options.get("seed")
            drawn: GenerationOptions = {**options, "seed": (self.seed if seed is None else seed) + self._asked}
            constraint = self._constraint()
            if constraint is None:
                pieces = self._model.pieces(ids, **drawn)
            else:
                pieces = self._model.constrained(ids, constraint, **drawn)
        except BaseException:
            self.messages, self.forgotten = before, forgotten
            raise
        self._asked += 1
        self._answering = pieces.through(self._recorded(pieces))
        return self._answering

    def retry_pieces(self, **options: Unpack[GenerationOptions]) -> Stream[Piece]:
        """Returns another answer to the last request token by token. It replaces the last answer; see `pieces`.

        Raises:
            SlmError: If there is no answer yet.
        """
        self._close()
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SlmError("there is no request to retry", "enter a message first")
        before = list(self.messages)
        last = max(place for place, message in enumerate(before) if message["role"] == "user")
        request = before[last]["content"]
        del self.messages[last:]
        try:
            return self.pieces(request, **options)
        except BaseException:
            self.messages = before
            raise

    def was_interrupted(self, message: Message) -> bool:
        """Returns whether a message of `messages` is an interrupted answer."""
        return any(message is each for each in self._cut)

    def abandon(self) -> None:
        """Drops the last request if its answer has calls without results."""
        self._settle()

    def _settle(self) -> None:
        """Ends an answer that was not read completely, and drops a request without an answer or with calls without results."""
        self._close()
        if self.messages and (self.messages[-1]["role"] in ("user", "tool") or self.calls):
            self._drop()

    def _close(self) -> None:
        """Ends an answer that was not read completely."""
        if self._answering is not None:
            self._answering.close()
            self._answering = None

    def _drop(self) -> None:
        """Drops the last request, and what followed it."""
        del self.messages[max(place for place, each in enumerate(self.messages) if each["role"] == "user") :]

    def _call_grammar(self, choice: str) -> CallGrammar | None:
        """Returns the compiled grammar of answers; None, and the reason in `unconstrained`, if there is none."""
        if not can_constrain():
            self.unconstrained = "llguidance is not installed"
            return None
        grammar = CallGrammar(self._model.tokenizer, self._model.decoder.vocab_size, self._model.stop_token_ids)
        try:
            for each in dict.fromkeys((choice, "auto")):
                grammar.prepared(self._tools, each)
        except SlmError as error:
            if choice != "auto":
                raise
            self.unconstrained = error.message
            return None
        finally:
            grammar.close()
        return grammar

    def _constraint(self) -> Constraint | None:
        """Returns the constraint of the next answer."""
        if self._grammar is None:
            return None
        choice = self._choice if self.messages[-1]["role"] == "user" else "auto"
        return self._grammar.prepared(self._tools, choice)()

    def _recorded(self, pieces: Stream[Piece]) -> Generator[Piece, None, None]:
        """Yields the pieces of an answer, and appends the answer to the conversation at the end."""
        said, whole = [], False
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
            whole = True
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages.append(self._message(answer))
                self._cut += [] if whole else self.messages[-1:]
            else:
                self._drop()  # a request without an answer is dropped, because turns alternate

    def _message(self, answer: str) -> Message:
        """Returns the message of an answer. Calls of unknown tools stay text."""
        text, calls = parsed_calls(answer, self.style) if self._tools else (answer, [])
        known = {tool.name: tool for tool in self._tools}
        if not calls or any(call.name not in known for call in calls):
            return {"role": "assistant", "content": answer}
        return {"role": "assistant", "content": text, "calls": tuple(ordered(call, known[call.name]) for call in calls)}

    def _ids(self, max_new_tokens: int) -> list[int]:
        context = self._model.decoder.context
        room = min(max_new_tokens, context // _LEAST_ROOM)
        first = 1 if self.system else 0
        while True:
            declared = self._tools if self._model.declares_tools else ()
            ids = chat_ids(self._model.tokenizer, self.messages, self._model.stop_token_ids, declared)
            requests = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
            if len(ids) + room <= context or len(requests) < 2:
                return ids
            del self.messages[first : requests[1]]
            self.forgotten += 1


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages after checking that a request can follow them.

    Raises:
        SlmError: If they are not a conversation that ends with an answer.
    """
    check_type("messages", messages, (list, tuple), 'a list of {"role": ..., "content": ...}')
    found: list[Message] = []
    for number, each in enumerate(cast("Sequence[Any]", messages), 1):
        calls = each.get("calls") or each.get("tool_calls") if isinstance(each, Mapping) else None
        if not isinstance(each, Mapping) or not isinstance("" if calls else each.get("content"), str):
            raise ArgumentError(f"message {number} is not an object with text as 'content'", _MESSAGE)
        if each.get("role") not in ("system", "user", "assistant", "tool"):
            raise ArgumentError(f"message {number} has the role {each.get('role')!r}", _MESSAGE)
        message: Message = {"role": each["role"], "content": each.get("content") or ""}
        if each["role"] == "assistant" and calls:
            ours = isinstance(calls, list | tuple) and all(isinstance(call, Call) for call in calls)
            message["calls"] = tuple(calls) if ours else called(calls)
        if each["role"] == "tool" and isinstance(each.get("tool_call_id"), str):
            message["tool_call_id"] = each["tool_call_id"]
        found.append(message)
    found = matched(found)
    roles = [message["role"] for message in found if message["role"] != "system"]
    if "system" in [message["role"] for message in found[1:]]:
        raise SlmError("a system message comes after the first message", "it begins a conversation")
    if any(before == after != "tool" for before, after in pairwise(roles)) or (roles and roles[0] != "user"):
        raise SlmError("user and assistant do not take turns in messages", "begin with the user's")
    if roles and roles[-1] != "assistant":
        raise SlmError("messages end with the user's", "leave the last one out and ask it: chat.ask(...)")
    return found


_MESSAGE = '{"role": "user" or "assistant", "content": text}'
