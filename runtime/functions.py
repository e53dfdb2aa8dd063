"""Tools from files: Python functions, which are called, and declarations in JSON, which are only declared."""

import asyncio
import inspect
import json
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from slm.core.errors import SlmError
from slm.core.files import read_text
from slm.core.tool_fields import MAX_TOOLS, declared
from slm.core.tools import Call, Tool

_HINT = "a .py file has functions with type hints and docstrings; a .json file has OpenAI's list of tools"
# A section of a docstring in Google's style, and a parameter in it.
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_PARAMETER = re.compile(r"^(\s+)(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
# The most characters of a result that the model reads.
_LONGEST_RESULT = 16_384


@dataclass(frozen=True)
class Function:
    """A Python function as a tool.

    Attributes:
        tool: Its declaration.
        function: The function.
        arguments: A pydantic model of its parameters.
    """

    tool: Tool
    function: Callable[..., Any]
    arguments: type[BaseModel]

    def result(self, call: Call) -> str:
        """Calls the function. Returns its result, or its error, as text for the model."""
        try:
            read = self.arguments.model_validate(call.arguments)
        except ValidationError as error:
            first = error.errors()[0]
            return f"error: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        try:
            found = self.function(**{name: getattr(read, name) for name in type(read).model_fields})
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except (Exception, SystemExit) as error:  # the model reads the error, as it would read a result
            text = f"error: {type(error).__name__}: {error}"
        return text[:_LONGEST_RESULT].encode(errors="replace").decode()  # a lone surrogate cannot be tokenized


@dataclass(frozen=True)
class Toolbox:
    """The tools of a conversation.

    Attributes:
        tools: Their declarations.
        functions: The functions among them, by name. Calls of the other tools are answered outside.
    """

    tools: tuple[Tool, ...] = ()
    functions: Mapping[str, Function] = field(default_factory=dict)

    @classmethod
    def of(cls, tools: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool]) -> "Toolbox":
        """Returns the tools of functions, of declarations in OpenAI's format, or both.

        Raises:
            SlmError: If a function has a parameter without a type, or a declaration is invalid.
        """
        functions = [function_of(each) for each in tools if callable(each)]
        found = [each.declaration if isinstance(each, Tool) else each for each in tools if not callable(each)]
        known = declared([*(each.tool.declaration for each in functions), *found])
        return cls(known, {each.tool.name: each for each in functions})


def load_tools(path: Path) -> Toolbox:
    """Returns the tools of a file. A .py file is executed: name only files that you trust.

    The tools of a .py file are its own functions whose names do not begin with an underscore.

    Raises:
        SlmError: If the file is missing, fails, or has no tools.
    """
    match path.suffix:
        case ".json":
            text = read_text(path, "the tools")
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                raise SlmError(f"{path}: not valid JSON", _HINT) from None
            found = found.get("tools") if isinstance(found, dict) and "tools" in found else found
            try:
                tools = Toolbox(declared([found] if isinstance(found, dict) else found))
            except SlmError as error:
                raise SlmError(f"{path}: {error.message}", error.hint) from None
        case ".py":
            tools = Toolbox.of(_functions(path))
        case _:
            raise SlmError(f"{path} is neither a .py nor a .json file", _HINT)
    if not tools.tools:
        raise SlmError(f"{path} has no tools", _HINT)
    return tools


def function_of(function: Callable[..., Any]) -> Function:
    """Returns a function as a tool: its schema is that of its type hints, its descriptions are those of its docstring.

    Raises:
        SlmError: If a parameter has no type hint, or one that has no JSON schema.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise SlmError(f"the type hints of {name} cannot be read: {error}", _HINT) from None
    about, parameters = _described(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise SlmError(f"{name} has the parameter {parameter}, which cannot be named in a call", _HINT)
        if parameter.name not in hints:
            raise SlmError(f"the parameter {parameter.name} of {name} has no type hint", _HINT)
        fields[parameter.name] = (
            hints[parameter.name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names such as `copy` are also methods of pydantic's models
            model = create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
            schema = _plain(model.model_json_schema())
    except Exception as error:  # pydantic raises many kinds for types without a schema
        reason = " ".join(str(error).split())[:200]
        raise SlmError(f"{name} has a parameter whose type has no JSON schema: {reason}", _HINT) from None
    for parameter_name, text in parameters.items():
        if parameter_name in schema.get("properties", {}):
            schema["properties"][parameter_name].setdefault("description", text)
    (tool,) = declared([{"name": name, "description": about, "parameters": schema}])
    return Function(tool, function, model)


def _functions(path: Path) -> list[Callable[..., Any]]:
    """Returns the functions that a file defines, in their order."""
    if not path.is_file():
        raise SlmError(f"{path} not found", _HINT)
    name = f"slm_tools_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # type hints and pickles look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise SlmError(f"{path} failed: {type(error).__name__}: {error}", "run it with Python to see where") from None
    found: list[Callable[..., Any]] = [
        each
        for name_, each in vars(module).items()
        if inspect.isfunction(each) and not name_.startswith("_") and each.__module__ == name
    ]
    if len(found) > MAX_TOOLS:
        raise SlmError(f"{path} has {len(found):,} functions; the limit is {MAX_TOOLS}", "begin other names with '_'")
    return found


def _described(text: str) -> tuple[str, dict[str, str]]:
    """Returns the description of a docstring in Google's style, and those of its parameters."""
    about: list[str] = []
    parameters: dict[str, str] = {}
    section = last = None
    indent = 0
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading is not None:
            section, last = heading[1], None
        elif section is None:
            about.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            found = _PARAMETER.match(line)
            if found is not None and (last is None or len(found[1]) <= indent):
                last, indent = found[2].lstrip("*"), len(found[1])
                parameters[last] = found[3].strip()
            elif last is not None and line.strip():
                parameters[last] = f"{parameters[last]} {line.strip()}".strip()
    return " ".join(" ".join(about).split()), {name: each for name, each in parameters.items() if each}


def _plain(schema: Any) -> Any:
    """Returns a schema without the titles that pydantic adds."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs")
    return {
        key: {name: _plain(each) for name, each in value.items()}
        if key in named and isinstance(value, dict)
        else _plain(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }
