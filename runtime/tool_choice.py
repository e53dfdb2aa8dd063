"""Which tools a reply in a conversation may call, and the grammar that its calls follow."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from slm.core.chat import tool_form
from slm.core.errors import SlmError
from slm.core.tokenizer import Tokenizer
from slm.core.tools import Tool

if TYPE_CHECKING:
    from slm.runtime.call_grammar import Replies
    from slm.runtime.guide import Constraint

_INSTALL = "pip install 'slm-edge[serve]' installs llguidance"


def can_constrain() -> bool:
    """Returns whether llguidance is installed, which constrains replies."""
    return find_spec("llguidance") is not None


def check_choice(choice: str, tools: Sequence[Tool]) -> None:
    """Checks a choice of tools.

    Args:
        choice: "auto", "none", "required", or the name of a tool.
        tools: The declared tools.

    Raises:
        SlmError: If there are no tools to choose from, the name is unknown, or forced calls are not possible.
    """
    if choice in ("auto", "none"):
        return
    require_grammar(choice)
    names = [tool.name for tool in tools]
    if not names:
        raise SlmError(f"the tool choice {choice!r:.80} requires tools", "declare tools, or use auto")
    if choice != "required" and choice not in names:
        raise SlmError(
            f"the tool choice {choice!r:.80} is not a declared tool",
            f"use auto, none, required, or one of: {', '.join(names)}",
        )


def require_grammar(choice: str) -> None:
    """Raises SlmError if llguidance, which a choice of tools requires, is not installed."""
    if not can_constrain():
        raise SlmError(f"the tool choice {choice!r:.80} requires llguidance, which is not installed", _INSTALL)


class CallGrammar:
    """Compiles the grammar of replies that may or must call tools; each reply has its own constraint.

    Keywords of schemas that llguidance does not support are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        """Stores the tokenizer.

        Args:
            tokenizer: The model's tokenizer.
            vocab_size: The number of the model's logits.
            stop_tokens: The tokens that end a reply.
        """
        from slm.runtime.constraint import Grammars

        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, vocab_size, tuple(stop_tokens), at_once=True)
        self._made: dict[tuple[str, str], Callable[[], Constraint]] = {}

    def prepared(self, tools: Sequence[Tool], choice: str = "auto") -> "Callable[[], Constraint]":
        """Compiles a grammar, once for the same tools. Returns a function that makes the constraint of one reply.

        Args:
            tools: The declared tools, at least one.
            choice: "auto" for text, calls or both; "required" for calls; the name of a tool for one call of it.

        Raises:
            SlmError: If the schemas of the tools are too large or not supported.
        """
        known = (json.dumps([tool.declaration for tool in tools]), choice)
        if known not in self._made:
            self._made[known] = self._grammars.prepared(self._replies(tools, choice))
        return self._made[known]

    def close(self) -> None:
        """Ends the process that checks grammars. Grammars that are compiled can still be used."""
        self._grammars.close()

    def _replies(self, tools: Sequence[Tool], choice: str) -> "Replies":
        from slm.runtime.call_grammar import Replies

        form = tool_form(self._tokenizer)
        named = choice not in ("auto", "required")
        return Replies(
            tools=[tool for tool in tools if not named or tool.name == choice],
            style=form.style,
            choice="auto" if choice == "auto" else "required",
            parallel=not named,
            lenient={tool.name for tool in tools},
            native=form.native,
        )
