"""Functions as tools: their schemas, calls and errors; files of tools."""

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator

from slm.core.errors import SlmError
from slm.core.tools import Call
from slm.runtime.functions import Toolbox, function_of, load_tools


class Room(Enum):
    HALL = "hall"
    KITCHEN = "kitchen"


def set_light(
    room: Room, on: bool, level: int | None = None, colours: tuple[Literal["red", "blue"], ...] = ()
) -> dict[str, Any]:
    """Turns a light on
    or off.

    It may dim it.

    Args:
        room: The room.
        on: Whether it is on,
            afterwards.
        level (int, optional): In percent.

    Returns:
        The state.
    """
    return {"room": room.value, "on": on, "level": level, "colours": list(colours)}


def test_the_schema_is_that_of_the_type_hints() -> None:
    tool = function_of(set_light).tool
    assert tool.name == "set_light"
    assert tool.description == "Turns a light on or off. It may dim it."
    schema = tool.parameters
    Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == ["room", "on", "level", "colours"]
    assert schema["required"] == ["room", "on"]
    assert schema["properties"]["on"] == {"type": "boolean", "description": "Whether it is on, afterwards."}
    assert schema["properties"]["level"]["description"] == "In percent."
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"room": "hall", "on": True, "level": 3, "colours": ["red"]})
    for wrong in ({"room": "attic", "on": True}, {"room": "hall"}, {"room": "hall", "on": True, "x": 1}):
        assert not validator.is_valid(wrong)


def test_calls_are_made_with_checked_arguments() -> None:
    function = function_of(set_light)
    result = function.result(Call("set_light", {"room": "hall", "on": True, "colours": ["red"]}))
    assert json.loads(result) == {"room": "hall", "on": True, "level": None, "colours": ["red"]}
    assert function.result(Call("set_light", {"room": "attic", "on": True})).startswith("error: room:")
    assert function.result(Call("set_light", {"on": True})).startswith("error: room: Field required")
    assert function.result(Call("set_light", {"room": "hall", "on": True, "more": 1})).startswith("error: more:")


def test_errors_and_coroutines_of_a_function_are_results() -> None:
    def fails(x: int) -> str:
        raise ValueError(f"no {x}")

    async def later(x: int) -> str:
        return "x" * x

    assert function_of(fails).result(Call("fails", {"x": 3})) == "error: ValueError: no 3"
    assert function_of(later).result(Call("later", {"x": 3})) == "xxx"
    assert len(function_of(later).result(Call("later", {"x": 99_999}))) == 16_384


def test_results_that_cannot_be_read_are_errors_or_replaced() -> None:
    def keys(x: int) -> dict[tuple[int, int], int]:
        return {(x, x): x}

    def surrogate(x: int) -> str:
        return "a\ud800b"

    def ends(x: int) -> str:
        raise SystemExit(x)

    assert function_of(keys).result(Call("keys", {"x": 3})).startswith("error: TypeError: keys must be")
    assert function_of(surrogate).result(Call("surrogate", {"x": 3})) == "a?b"
    assert function_of(ends).result(Call("ends", {"x": 3})) == "error: SystemExit: 3"


def untyped(x) -> str:  # type: ignore[no-untyped-def]
    return str(x)


def variadic(*x: int) -> str:
    return str(x)


def strange(x: Callable[[], int]) -> str:
    return str(x)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (untyped, "the parameter x of untyped has no type hint"),
        (variadic, r"variadic has the parameter \*x"),
        (strange, "strange has a parameter whose type has no JSON schema"),
    ],
)
def test_functions_that_cannot_be_declared(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(SlmError, match=said):
        function_of(function)


FILE = '''
from __future__ import annotations
import math
from os.path import join

def area(radius: float) -> float:
    """Area of a circle."""
    return _square(radius) * math.pi

def _square(x: float) -> float:
    return x * x
'''


def test_a_file_of_functions(tmp_path: Path) -> None:
    file = tmp_path / "shapes.py"
    file.write_text(FILE)
    box = load_tools(file)
    assert [tool.name for tool in box.tools] == ["area"]  # neither what it imports nor what it hides
    assert box.functions["area"].result(Call("area", {"radius": 1})).startswith("3.14")


def test_a_file_of_declarations(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    for content in ([{"type": "function", "function": {"name": "f"}}], {"tools": [{"name": "f"}]}, {"name": "f"}):
        file.write_text(json.dumps(content))
        box = load_tools(file)
        assert [tool.name for tool in box.tools] == ["f"] and not box.functions


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.py", None, "missing.py not found"),
        ("a.py", "1 / 0", "a.py failed: ZeroDivisionError"),
        ("a.py", "def f(:", "a.py failed: SyntaxError"),
        ("a.py", "import sys; sys.exit(0)", "a.py failed: SystemExit"),
        ("a.py", "x = 1", "a.py has no tools"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[]", "a.json has no tools"),
        ("a.json", '[{"name": "a b"}]', "a.json: tool 1 has the name 'a b'"),
        ("a.txt", "x", "neither a .py nor a .json"),
    ],
)
def test_files_that_have_no_tools(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(SlmError, match=said) as error:
        load_tools(file)
    assert error.value.hint


def test_functions_beside_declarations() -> None:
    box = Toolbox.of([set_light, {"type": "function", "function": {"name": "f"}}])
    assert [tool.name for tool in box.tools] == ["set_light", "f"] and list(box.functions) == ["set_light"]
    with pytest.raises(SlmError, match="two tools have the name"):
        Toolbox.of([set_light, set_light])
