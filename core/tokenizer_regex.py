"""Accepts only those regular expressions of a `tokenizer.json` that run in linear time.

The tokenizers library uses Oniguruma, which backtracks and cannot be interrupted: `(a+)+$` takes exponential time, and
`a+[bc]` takes quadratic time on a text of a's. An expression is accepted under three conditions:

- An unbounded repeat covers one character class, or a group of fixed length. Unbounded repeats are not nested.
- An alternative backtracks over at most one unbounded repeat, that is, at most one is followed by something that can fail. A
  later alternative must then match the same run of characters, so that the scan was not wasted. The expressions of GPT-2,
  GPT-4, Llama 3, Qwen, DeepSeek and others have this form: `\\s+(?!\\S)|\\s+`. `\\s+(?!\\S)` alone leaves one character.
- Everything bounded is small: its number of ways to match times its length is limited (`MAX_WORK`).

Syntax: https://github.com/kkos/oniguruma/blob/master/doc/RE. Syntax that this parser does not know is rejected.
"""

import re
from dataclasses import dataclass, field
from itertools import product

MAX_CHARACTERS = 4096
# The most steps at one position of the text, over all alternatives. GPT-4o's expression needs 200.
MAX_WORK = 1024
_MAX_DEPTH = 16
_MAX_ROUTES = 256

_PROPERTY = re.compile(r"\\[pP]\{\^?[A-Za-z0-9_ =-]{1,64}\}")
_HEXADECIMAL = re.compile(r"\\(?:x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4})")
_CLASS_NAME = re.compile(r"\[:\^?[a-z]+:\]")
_INTERVAL = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")
_FLAGS = re.compile(r"\?([im]*)(?:-[im]+)?([:)])")
_ONE_CHARACTER, _ZERO_WIDTH = "sSdDwWhHnrtfvae", "bBAzZG"
_LOOKAROUND = ("?=", "?!", "?<=", "?<!")


class Slow(ValueError):
    """The reason why an expression is rejected, as the end of a sentence."""


@dataclass(frozen=True)
class _Part:
    """A piece of an alternative.

    Attributes:
        text: The source of the piece, with its flags.
        ways: Number of ways to match at one position, without unbounded repeats.
        width: The largest number of characters matched, without unbounded repeats.
        shortest: The smallest number of characters matched.
        optional: Whether the piece always matches, if only the empty string.
        repeats: The source of what is repeated without bound; empty if nothing is.
        kept: Whether the repeat is possessive, so that it never backtracks.
        lazy: Whether the repeat matches as little as possible.
        run: The class, if the piece is a class repeated by a plain "+" without flags.
    """

    text: str
    ways: int = 1
    width: int = 1
    shortest: int = 1
    optional: bool = False
    repeats: str = ""
    kept: bool = False
    lazy: bool = False
    run: str = ""


_Route = tuple[_Part, ...]


@dataclass(frozen=True)
class Linear:
    """An expression that runs in linear time.

    Attributes:
        expression: The expression for the library; see `linear_regex`.
        shortest: The smallest number of characters that it matches.
        work: Steps at one position of the text.
    """

    expression: str
    shortest: int
    work: int


def linear_regex(expression: str) -> Linear:
    """Returns an expression that finds the same matches in linear time.

    It is the given expression, except for the form of DeepSeek's `\\s+$`: a repeated class, followed by something that can
    fail. Such a match can only start at the beginning of a run, so `(?<!\\s)` is put before it, and each run is scanned once.

    Raises:
        Slow: If the expression may take longer, or uses syntax that is not supported.
    """
    if not 0 < len(expression) <= MAX_CHARACTERS:
        raise Slow(f"it has {len(expression):,} characters; it must have 1 to {MAX_CHARACTERS:,}")
    reader = _Reader(expression)
    routes = reader.alternatives(0)
    if reader.at != len(expression):
        raise Slow(f"its ')' at character {reader.at + 1} has no '('")
    work = sum(_work(route) for route in routes)
    if work > MAX_WORK:
        raise Slow("it has too many ways to match")
    shortest = min(sum(part.shortest for part in route) for route in routes)
    first = routes[0][0] if len(routes) == 1 and routes[0] else None
    if first and first.run and not any(part.repeats for part in routes[0][1:]) and _may_fail(routes[0][1:]):
        return Linear(f"(?<!{first.run}){expression}", shortest, work + 1)
    for number, route in enumerate(routes):
        _check_route(route, routes[number + 1 :])
    return Linear(expression, shortest, work)


def _work(route: _Route) -> int:
    ways, width = 1, 1
    for part in route:
        ways, width = ways * part.ways, width + part.width
    return ways * width


def _check_route(route: _Route, later: list[_Route]) -> None:
    """Checks the repeats of an alternative that may backtrack."""
    wasted = [
        place
        for place, part in enumerate(route)
        if part.repeats and _may_fail(route[place + 1 :]) and not _gives_up_one(route[place:])
    ]
    if sum(not route[place].kept for place in wasted) > 1:
        raise Slow("one alternative backtracks over several unbounded repeats, which takes quadratic time")
    for place in wasted:
        if not _is_kept_by(route, place, later):
            raise Slow(f"{route[place].text} may match a long run in vain, which takes quadratic time")


def _may_fail(parts: _Route) -> bool:
    return any(not part.optional for part in parts)


def _gives_up_one(parts: _Route) -> bool:
    """Returns whether parts are `\\s+(?!\\S)`: it never fails, and keeps all of several white spaces except perhaps one."""
    return len(parts) == 2 and parts[0].run == r"\s" and parts[1].text == r"(?)(?!\S)"


def _is_kept_by(route: _Route, place: int, later: list[_Route]) -> bool:
    """Returns whether a later alternative matches the run over which this one backtracks, before any other can."""
    for other in later:
        places = [i for i, part in enumerate(other) if part.repeats == route[place].repeats and not part.lazy]
        if not places:
            return False
        first = places[0]
        before = [part.text for part in other[:first]]
        same = before == [part.text for part in route[:place]] or not _may_fail(other[:first])
        if same and (not _may_fail(other[first + 1 :]) or _gives_up_one(other[first:])):
            return True
    return False


@dataclass
class _Reader:
    """Parses an expression into its alternatives."""

    source: str
    at: int = 0
    flags: str = field(default="")

    def alternatives(self, depth: int) -> list[_Route]:
        """Returns the alternatives up to the end of the expression or of the group."""
        if depth > _MAX_DEPTH:
            raise Slow("its groups are nested too deeply")
        flags = self.flags
        routes: list[_Route] = []
        current: list[_Route] = [()]
        while self.at < len(self.source) and self.source[self.at] != ")":
            if self.source[self.at] == "|":
                self.at += 1
                routes, current = [*routes, *current], [()]
                continue
            item = self._quantified(self._item(depth))
            if len(routes) + len(current) * len(item) > _MAX_ROUTES:
                raise Slow(f"it has more than {_MAX_ROUTES} alternatives")
            current = [before + after for before, after in product(current, item)]
        self.flags = flags
        return [*routes, *current]

    def _item(self, depth: int) -> list[_Route]:
        """Returns the alternatives of the next character, class, anchor or group."""
        start, character = self.at, self.source[self.at]
        if character == "(":
            return self._group(depth)
        if character == "[":
            self._skip_class()
        elif character == "\\":
            return [(self._escape(),)]
        elif character in "*+?":
            raise Slow(f"its {character!r} at character {start + 1} has nothing to repeat")
        else:
            self.at += 1
            if character in "^$":
                return [(_Part(self._written(start), width=0, shortest=0),)]
            if character == "{" and _INTERVAL.match(self.source, start):
                raise Slow(f"its interval at character {start + 1} has nothing to repeat")
        return [(_Part(self._written(start)),)]

    def _written(self, start: int) -> str:
        return f"(?{self.flags}){self.source[start : self.at]}"

    def _escape(self) -> _Part:
        start = self.at
        following = self.source[start + 1 : start + 2]
        for form in (_PROPERTY, _HEXADECIMAL):
            if found := form.match(self.source, start):
                self.at = found.end()
                return _Part(self._written(start))
        self.at += 2
        if following in _ZERO_WIDTH and following:
            return _Part(self._written(start), width=0, shortest=0)
        if following == "R":  # a line break: "\r\n" or one character
            return _Part(self._written(start), ways=2, width=2)
        if following and (following in _ONE_CHARACTER or not (following.isalnum() or following == "_")):
            return _Part(self._written(start))
        raise Slow(f"\\{following} is not supported")

    def _skip_class(self) -> None:
        """Moves past a character class."""
        depth = 0
        while self.at < len(self.source):
            character = self.source[self.at]
            if character == "\\":
                if not self._escape().width or self.source[self.at - 1] == "R":
                    raise Slow("an anchor in a character class is not supported")
                continue
            if character == "[":
                if named := _CLASS_NAME.match(self.source, self.at):
                    self.at = named.end()
                    continue
                depth += 1
                self.at += 1 + self.source.startswith("^", self.at + 1)
                if depth > _MAX_DEPTH or self.source[self.at : self.at + 1] in ("]", ":"):
                    raise Slow("a character class of this form is not supported")
                continue
            self.at += 1
            if character == "]":
                depth -= 1
                if depth == 0:
                    return
        raise Slow("a character class has no end")

    def _group(self, depth: int) -> list[_Route]:
        start = self.at
        self.at += 1
        look = next((form for form in _LOOKAROUND if self.source.startswith(form, self.at)), None)
        flags = self.flags
        if look is not None:
            self.at += len(look)
        elif found := _FLAGS.match(self.source, self.at):
            self.at = found.end()
            self.flags = "".join(sorted({*flags, *found[1]})) if "-" not in found[0] else f"{flags}{found[0]}"
            if found[2] == ")":  # the flags apply up to the end of the enclosing group
                return [()]
        elif self.source.startswith("?>", self.at):  # an atomic group; counted as if it could backtrack
            self.at += 2
        elif self.source.startswith(("?", "*"), self.at):
            raise Slow(f"a group that starts with ({self.source[self.at : self.at + 2]} is not supported")
        routes = self.alternatives(depth + 1)
        if not self.source.startswith(")", self.at):
            raise Slow("a group has no end")
        self.at += 1
        self.flags = flags
        if look is None:
            return routes
        if any(part.repeats for route in routes for part in route):
            raise Slow("an unbounded repeat within a lookahead or lookbehind takes quadratic time")
        return [(_Part(self._written(start), _ways(routes), _width(routes), 0),)]

    def _quantified(self, routes: list[_Route]) -> list[_Route]:
        """Returns the alternatives of an item with the quantifiers that follow it."""
        while True:
            start = self.at
            least, most, kept = self._quantifier()
            if least is None:
                return routes
            routes = _repeated(routes, least, most, kept, self.source[start : self.at])

    def _quantifier(self) -> tuple[int | None, int | None, bool]:
        """Returns the smallest and largest count (None for no bound) and whether it is possessive; None without quantifier."""
        following = self.source[self.at : self.at + 1]
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if following and following in simple:
            self.at += 1
            suffix = self.source[self.at : self.at + 1]
            self.at += suffix in ("?", "+") and suffix != ""
            return *simple[following], suffix == "+"
        found = _INTERVAL.match(self.source, self.at) if following == "{" else None
        if found is None or not (found[1] or found[3]):
            return None, None, False
        self.at = found.end()
        least = int(found[1] or 0)
        most = least if not found[2] else int(found[3]) if found[3] else None
        if self.source.startswith("?", self.at):  # a lazy quantifier; {n}? means {0,n}
            self.at += 1
            least = 0 if not found[2] else least
        return least, most, False


def _repeated(routes: list[_Route], least: int, most: int | None, kept: bool, quantifier: str) -> list[_Route]:
    text = "|".join("".join(part.text for part in route) for route in routes)
    unbounded = any(part.repeats for route in routes for part in route)
    if most is not None and most < least:
        raise Slow(f"the interval {quantifier} has its bounds reversed")
    if most is None:
        (route, *others) = routes
        fixed = not others and route and all(part.ways == part.width == part.shortest == 1 for part in route)
        if unbounded or not fixed:
            raise Slow(f"the unbounded repeat ({text}){quantifier} covers more than a class or a group of fixed length")
        length = len(route)
        lazy = len(quantifier) > 1 and quantifier.endswith("?")
        run = text.removeprefix("(?)") if length == 1 and quantifier == "+" and text.startswith("(?)") else ""
        return [(_Part(f"({text}){quantifier}", 1, least * length, least * length, least == 0, text, kept, lazy, run),)]
    if unbounded:
        if (least, most) == (0, 1):
            return [*routes, ()]
        raise Slow(f"({text}){quantifier} repeats an unbounded repeat")
    if most > 1 and any(not _may_fail(route) for route in routes):
        raise Slow(f"({text}){quantifier} repeats something that may match the empty string")
    ways, one = 0, _ways(routes)
    for count in range(least, most + 1):
        ways += one**count if count <= MAX_WORK else MAX_WORK
        if ways > MAX_WORK or most > MAX_WORK:
            raise Slow(f"{quantifier} allows too many ways to match")
    shortest = min(sum(part.shortest for part in route) for route in routes)
    optional = least == 0 or any(not _may_fail(route) for route in routes)
    return [(_Part(f"({text}){quantifier}", ways, most * _width(routes), least * shortest, optional),)]


def _ways(routes: list[_Route]) -> int:
    total = 0
    for route in routes:
        ways = 1
        for part in route:
            ways = min(ways * part.ways, MAX_WORK + 1)
        total += ways
    return total


def _width(routes: list[_Route]) -> int:
    return max(sum(part.width for part in route) for route in routes)
