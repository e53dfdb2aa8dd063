"""The fine-tuning rows: what to tell, asked in many ways, and a very short story that does it."""

import random
import re
from dataclasses import dataclass

from slm.train.stories.grammar import Plot, draw, expand, fill, narrate, pick, shuffled

MAX_SENTENCES = 4
_SENTENCE_END = re.compile(r'[.!?]"?(?= [A-Z"]|$)')


@dataclass(frozen=True)
class Pair:
    """One row, and the hero and the object its output has to speak of."""

    instruction: str
    output: str
    hero: str
    obj: str


@dataclass(frozen=True)
class Task:
    """Something a hero does, in the present and in the past tense, and the plot that tells of it."""

    does: str
    did: str
    plot: Plot


# {about} is "a fox" or "a girl named Mia", {name} is "Rusty the fox" or "Mia".
ABOUT = (
    "Tell me a story about {about} who {does}.",
    "Tell me a short story about {about} who {does}.",
    "Write a story about {about} who {does}.",
    "Can you tell me a story about {about} who {does}?",
    "I want to hear a story about {about} who {does}.",
    "Please write a little story about {about} who {does}.",
)
NAMED = (
    "Write a short story in which {name} {does}.",
    "Tell me a story in which {name} {does}.",
    "Please make up a story in which {name} {does}.",
    "Tell me what happened when {name} {did}.",
    "Can you make up a little story in which {name} {does}?",
    "Tell me about the day when {name} {did}.",
)

OPENING = """
- {day}, {who} went {to}.
- {day}, {who} was playing {at}.
"""

TASKS = (
    Task(
        "finds {a obj}",
        "found {a obj}",
        Plot(
            name="find",
            objects=("key", "ring", "bell", "book", "hat", "bag"),
            places=("park", "garden", "forest", "meadow", "hill", "river", "beach"),
            text=OPENING
            + """
- {He} looked {spot} and found {a thing}.
- {Spot}, {he} found {a thing}.

- {A elder} had lost it, so {hero} gave the {obj} back.
- {He} gave the {obj} back to {a elder}, who was {happy}.

?
- "Thank you!" said the {elder}.
""",
        ),
    ),
    Task(
        "loses {his} {obj}",
        "lost {his} {obj}",
        Plot(
            name="lose",
            objects=("ball", "hat", "scarf", "teddy bear", "book", "toy car", "bell"),
            places=("park", "garden", "forest", "meadow", "hill", "beach", "farm"),
            text=OPENING
            + """
- {He} lost {his} {thing} and was {sad}.
- Then {he} lost {his} {thing}.

- {Pal} helped {him} to look, and they found the {obj} {spot}.
- {Pal} looked {spot} and found the {obj}.

?
- "Thank you, {friend}," said {hero}.
- {Hero} hugged the {obj} and laughed.
""",
        ),
    ),
    Task(
        "shares {a obj}",
        "shared {a obj}",
        Plot(
            name="share a toy",
            objects=("kite", "ball", "drum", "toy car", "toy boat", "wagon"),
            places=("park", "garden", "meadow", "beach", "farm"),
            text=OPENING
            + """
- {He} had {a thing}, and {pal} wanted to play with it.
- {Pal} wanted to play with {his} {thing}.

- "We can share it," said {hero}, and they took turns with the {obj}.
- {Hero} shared the {obj} with {friend}, and they played together.

?
- It was more fun with two.
- They were both {happy}.
""",
        ),
    ),
    Task(
        "shares {a obj}",
        "shared {a obj}",
        Plot(
            name="share food",
            objects=("cookie", "cake", "pie", "apple", "carrot", "sandwich"),
            places=("park", "meadow", "river", "hill", "beach", "lake"),
            text="""
- {day}, {who} took {a thing} {to} for lunch.
- {Who} had {a thing} for lunch.

- {Pal} had nothing to eat.
- {Pal} was hungry too.

- {Hero} gave {friend} half of the {obj}.
- "We can share," said {hero}, and {he} gave {friend} half of the {obj}.

?
- They sat down and ate together.
- They were both {happy}.
""",
        ),
    ),
    Task(
        "mends {a obj}",
        "mended {a obj}",
        Plot(
            name="mend",
            fields="obj/part/fix",
            objects=(
                "toy car/wheel/put the wheel back",
                "wagon/wheel/put the wheel back",
                "kite/tail/tied on a new tail",
                "toy boat/sail/made a new sail",
                "doll/arm/put the arm back",
                "teddy bear/ear/put the ear back",
            ),
            places=("park", "garden", "meadow", "beach", "farm"),
            text="""
- {day}, {who} was playing with {a thing} {at}, and the {part} broke off.
- {Who} had {a thing}. {day}, the {part} broke off.

- {Mom} helped {him}, and {he} {fix}.
- {Hero} sat down at the table and {fix}.

- Now the {obj} was as good as new.
- {He} had mended the {obj} and was {happy}.
""",
        ),
    ),
    Task(
        "learns to {obj}",
        "learned to {obj}",
        Plot(
            name="learn",
            objects=("ride a bike", "ride a scooter", "swim"),
            places=("park", "hill", "farm"),
            fits={"swim": ("lake", "river", "beach")},
            text="""
- {Who} wanted to learn to {obj}, but it was too hard.
- {Who} could not {obj}, and {he} was {sad}.

- {Pal} helped {him}, and {he} tried {at} every day.
- "Do not give up," said {pal}, so {hero} tried every day.

- Then, one day, {he} could {obj}.
- At last, {he} could {obj}.

?
- "Look at me!" {he} shouted.
- {Hero} was {happy}.
""",
        ),
    ),
    Task(
        "is afraid of the {obj}",
        "was afraid of the {obj}",
        Plot(
            name="fear",
            fields="obj/help",
            objects=(
                "dark/gave {him} a little lantern",
                "storm/sang a song for {him}",
                "water/gave {him} a board to hold on to",
                "night/told {him} a story",
            ),
            places=("park",),
            text="""
- {Who} was afraid of the {obj}.
- {Who} was brave, but {he} was afraid of the {obj}.

- {Parent} {help}.
- "Do not be afraid," said {parent}, and {help}.

- After that, {hero} was not afraid anymore.
- Now {he} was not so afraid.
""",
        ),
    ),
    Task(
        "plants a {obj} seed",
        "planted a {obj} seed",
        Plot(
            name="plant",
            fields="obj/crop/use",
            objects=(
                "sunflower/a tall yellow sunflower/gave the seeds to the birds",
                "pumpkin/a big orange pumpkin/made a big pot of soup",
                "carrot/a long orange carrot/ate it for lunch",
                "rose/a pretty red rose/put it on the table",
                "bean/a tall green bean plant/made a big pot of soup",
            ),
            places=("garden", "hill", "meadow", "farm"),
            text="""
- {day}, {who} planted a {obj} seed {at}.
- {Who} had a {obj} seed and planted it {at}.

- {He} gave it water every day, and it grew and grew.
- {He} gave it some water and waited.

- Soon it was {crop}.
- At last, it was {crop}.

?
- {Hero} and {pal} {use}.
- {Hero} was {happy}.
""",
        ),
    ),
    Task(
        "gives {a obj} to a friend",
        "gave {a obj} to a friend",
        Plot(
            name="give",
            fields="obj/make",
            objects=(
                "picture/painted a picture of the sun",
                "cake/made a cake with honey",
                "hat/made a hat from soft wool",
                "scarf/made a scarf from soft wool",
                "kite/made a kite from paper and string",
                "basket/made a basket from long grass",
            ),
            places=("garden", "park", "meadow", "beach"),
            text="""
- {Who} wanted to make a surprise for {pal}, so {he} {make}.
- {day}, {who} {make}.

- {Hero} gave the {obj} to {pal} {at}.
- {He} gave the {obj} to {pal}.

- "Thank you!" said {friend}.
- {Friend} was {happy} and hugged {hero}.
""",
        ),
    ),
)


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
