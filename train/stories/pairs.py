"""The fine-tuning rows: what to tell, asked in many ways, and a very short story that does it."""

import random
import re
from dataclasses import dataclass

from slm.train.stories.grammar import draw, expand, fill, narrate, pick, shuffled
from slm.train.stories.plots import ABOUT, NAMED, TASKS, Task

MAX_SENTENCES = 4
_SENTENCE_END = re.compile(r'[.!?]"?(?= [A-Z"]|$)')


@dataclass(frozen=True)
class Pair:
    """One row, and the hero and the object its output has to speak of."""

    instruction: str
    output: str
    hero: str
    obj: str


def make_pair(rng: random.Random, task: Task) -> Pair:
    """One row for a task, with a new cast."""
    slots = draw(rng, task.plot)
    child = slots["hero"] == slots["full"]
    named = rng.random() < 0.5
    full = "{a trait} {kind} named {hero}"
    slots["about"] = "a {kind} named {hero}" if child else "{a kind}"
    slots["name"] = slots["full"]
    slots["who"] = slots["full"] if named else fill(full, slots)
    slots["does"], slots["did"] = task.does, task.did
    while len(_SENTENCE_END.findall(output := narrate(rng, task.plot, slots))) > MAX_SENTENCES:
        pass
    instruction = expand(rng, pick(rng, NAMED if named else ABOUT), slots)
    hero = slots["hero"] if child or named else slots["kind"]
    return Pair(instruction, output, hero, slots["obj"])


def make_pairs(rng: random.Random, count: int) -> list[Pair]:
    """`count` rows, round after round of all the tasks in a new order, no hero meeting an object twice in a task.

    Any stretch of rows therefore holds every task about equally often, and the tail can be kept back for evaluation.
    """
    pairs: list[Pair] = []
    seen: set[tuple[str, str, str]] = set()
    while True:
        for task in shuffled(rng, TASKS):
            while (key := (task.plot.name, (pair := make_pair(rng, task)).hero, pair.obj)) in seen:
                pass
            seen.add(key)
            pairs.append(pair)
            if len(pairs) == count:
                return pairs
