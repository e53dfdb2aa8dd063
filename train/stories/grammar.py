"""A small story grammar: templates with choices, a cast drawn for each story, and plots made of beats.

Template language:

    [one|two|]      one of the alternatives, nesting allowed, possibly empty
    {hero}          a slot of the cast, a field of the plot, or a macro of the lexicon
    {Hero}          the same with a capital letter
    {a thing}       the same with its indefinite article, `{A thing}` with a capital one

A plot's text is a sequence of beats separated by blank lines. A beat is a list of variants, each starting with "- "
and free to run over several lines; one variant is told. A line `?` before them says that the beat may be left out, a
line `~` between two beats that a paragraph may end there.

Every draw is `random.Random.random()` and integer arithmetic, which give the same text on every Python version.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from slm.train.stories.lexicon import (
    ANIMAL,
    CHILD,
    ELDERS,
    FAMILY,
    HEROES,
    HOMES,
    MACROS,
    PLACES,
    PRONOUNS,
    THINGS,
    TRAITS,
    Hero,
)

T = TypeVar("T")

MIN_WORDS, MAX_WORDS = 60, 160
SKIP = 0.5  # how often a beat marked `?` is left out
FLAT = 0.4  # the share of stories in one paragraph; in the others
BREAK = 0.5  # this share of the `~` become empty lines

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]+)\}")


class Beat(NamedTuple):
    """One step of a story."""

    optional: bool
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """A story to tell, in as many ways as its beats have variants.

    Attributes:
        name: Unique name.
        objects: What the story is about, one value for each name in `fields`, separated by "/".
        places: Names in `PLACES`.
        text: The beats (see the module's docstring).
        fields: Slot names for the parts of an entry of `objects`; the first is `obj`.
        fits: Places of their own for objects that do not fit all of `places`.
        lets: More slots drawn once for each story; a key may name several slots at once, like `fields`.
        world: `CHILD` or `ANIMAL` if only they can lead the story, "" if both can.
        without: Kinds of animals that cannot lead it (a duck does not learn to swim).
    """

    name: str
    objects: tuple[str, ...]
    places: tuple[str, ...]
    text: str
    fields: str = "obj"
    fits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    world: str = ""
    without: tuple[str, ...] = ()

    def heroes(self) -> tuple[Hero, ...]:
        """Everyone who can lead this story."""
        worlds = (self.world,) if self.world else (CHILD, ANIMAL)
        return tuple(hero for hero in HEROES if hero.world in worlds and hero.kind not in self.without)

    def paragraphs(self) -> list[list[Beat]]:
        """The text as paragraphs of beats."""
        return [
            [
                Beat(
                    optional=beat.startswith("?"),
                    variants=tuple(" ".join(v.split()) for v in re.split(r"^- ", beat, flags=re.MULTILINE)[1:]),
                )
                for beat in re.split(r"\n\n", part.strip())
            ]
            for part in re.split(r"^~$", self.text, flags=re.MULTILINE)
        ]


@dataclass(frozen=True)
class Story:
    """One told story, and what it was told about. `key` is what never crosses the train/validation split."""

    plot: str
    hero: str
    obj: str
    place: str
    text: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """(plot, hero, object, place)."""
        return self.plot, self.hero, self.obj, self.place


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item, uniformly."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """A uniformly shuffled copy (Fisher-Yates, since `Random.shuffle` promises no stable results)."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        out[i], out[j] = out[j], out[i]
    return out


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def capital(phrase: str) -> str:
    """The phrase with its first letter in upper case."""
    return phrase[:1].upper() + phrase[1:]


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Replace every slot; the values of macros bring slots of their own.

    Raises:
        KeyError: a slot has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in slots:
            return slots[name]
        if name.startswith(("a ", "A ")):
            phrase = article(slots[name[2:]])
            return capital(phrase) if name[0] == "A" else phrase
        return capital(slots[name[0].lower() + name[1:]])

    while "{" in template:
        template = _SLOT.sub(value, template)
    return template


def expand(rng: random.Random, template: str, slots: Mapping[str, str]) -> str:
    """Fill the slots, then settle the choices, innermost first, and tidy the spaces left by empty ones."""
    text = fill(template, slots)
    while match := _CHOICE.search(text):
        text = text[: match.start()] + pick(rng, match[1].split("|")) + text[match.end() :]
    return " ".join(text.split())


def cast(rng: random.Random, hero: Hero) -> dict[str, str]:
    """The slots that describe the hero and those the hero knows.

    The friend has the other pronoun, so that "he" and "she" stay clear, and in the animals' world is another animal.
    """
    friends = [h for h in HEROES if h.world == hero.world and h.pronoun != hero.pronoun and h.kind != hero.kind]
    friend = pick(rng, friends)
    forms = PRONOUNS[hero.pronoun]
    family = pick(rng, FAMILY)
    return {
        **MACROS,
        **forms,
        **{f"f{form}": word for form, word in PRONOUNS[friend.pronoun].items()},
        "hero": hero.name,
        "kind": hero.kind,
        "full": hero.full,
        "trait": pick(rng, TRAITS),
        "home": pick(rng, HOMES[hero.world]),
        "friend": friend.name,
        "fkind": friend.kind,
        "ffull": friend.full,
        "pal": f"{forms['his']} friend {friend.full}",  # until the friend has been met: see `narrate`
        "mom": capital(family),
        "parent": f"{forms['his']} {family}",
        "elder": pick(rng, ELDERS[hero.world]),
    }


def draw(rng: random.Random, plot: Plot) -> dict[str, str]:
    """All the slots of one story: the cast, the object and its parts, the place and its spots."""
    slots = cast(rng, pick(rng, plot.heroes()))
    for names, values in ((plot.fields, plot.objects), *plot.lets.items()):
        slots.update(zip(names.split("/"), pick(rng, values).split("/"), strict=True))
    obj = slots["obj"]
    if obj in THINGS:
        slots["adj"] = pick(rng, THINGS[obj])
        slots["thing"] = f"{slots['adj']} {obj}"
    slots["place"] = pick(rng, plot.fits.get(obj, plot.places))
    place = PLACES[slots["place"]]
    slots.update(at=place.at, to=place.to)
    slots.update(zip(("spot", "spot2", "spot3"), shuffled(rng, place.spots), strict=False))
    return slots


def narrate(rng: random.Random, plot: Plot, slots: dict[str, str]) -> str:
    """Tell a plot with these slots, each time in other words."""
    slots = dict(slots)
    flat = rng.random() < FLAT
    text = ""
    for part in plot.paragraphs():
        gap = "" if not text else " " if flat or rng.random() >= BREAK else "\n\n"
        for beat in part:
            if beat.optional and rng.random() < SKIP:
                continue
            told = expand(rng, pick(rng, beat.variants), slots)
            text += gap + told
            gap = " "
            if re.search(rf"\b{slots['friend']}\b", told):
                slots["pal"] = slots["friend"]
    return text


def tell(rng: random.Random, plot: Plot) -> Story:
    """Tell a plot with a new cast, as often as it takes to get a story of a fitting length."""
    while True:
        slots = draw(rng, plot)
        text = narrate(rng, plot, slots)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return Story(plot.name, slots["hero"], slots["obj"], slots["place"], text)
