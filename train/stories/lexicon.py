"""The world of the sample stories: who lives there, what they own and where they go.

It is small on purpose: about seven hundred words, so that nearly all of them are one token in a vocabulary of a thousand.
"""

from dataclasses import dataclass

CHILD = "child"
ANIMAL = "animal"


@dataclass(frozen=True)
class Hero:
    """A character who can lead a story. The pronoun ("he" or "she") decides every other form."""

    name: str
    kind: str
    pronoun: str

    @property
    def world(self) -> str:
        """`CHILD` or `ANIMAL`: children meet children and animals meet animals."""
        return CHILD if self.kind in ("girl", "boy") else ANIMAL

    @property
    def full(self) -> str:
        """The name for a first mention: "Mia", but "Rusty the fox"."""
        return self.name if self.world == CHILD else f"{self.name} the {self.kind}"


@dataclass(frozen=True)
class Place:
    """A place with its prepositions, and spots where something can be lost or found."""

    at: str
    to: str
    spots: tuple[str, str, str]


HEROES: tuple[Hero, ...] = (
    *(Hero(name, "girl", "she") for name in ("Mia", "Lily", "Anna", "Zoe", "Lucy", "Nora")),
    *(Hero(name, "boy", "he") for name in ("Tom", "Ben", "Max", "Leo", "Sam", "Tim")),
    *(
        Hero(name, kind, pronoun)
        for kind, he, she in (
            ("fox", "Rusty", "Ruby"),
            ("rabbit", "Hugo", "Clover"),
            ("bear", "Bruno", "Bella"),
            ("mouse", "Pip", "Dot"),
            ("cat", "Milo", "Poppy"),
            ("puppy", "Buddy", "Daisy"),
            ("squirrel", "Chip", "Hazel"),
        )
        for name, pronoun in ((he, "he"), (she, "she"))
    ),
)

PRONOUNS: dict[str, dict[str, str]] = {
    "he": {"he": "he", "him": "him", "his": "his", "hers": "his"},
    "she": {"he": "she", "him": "her", "his": "her", "hers": "hers"},
}

TRAITS = ("little", "small", "young", "kind", "happy", "quiet")

HOMES: dict[str, tuple[str, ...]] = {
    CHILD: ("in a small house", "on a farm", "in a house with a red door"),
    ANIMAL: ("under a big tree", "in the forest", "behind a green hill"),
}

ELDERS: dict[str, tuple[str, ...]] = {
    CHILD: ("old man", "old woman", "farmer"),
    ANIMAL: ("old badger", "old goat", "old turtle"),
}

FAMILY = ("mom", "dad", "grandma")

# The adjectives each thing can have; a story keeps the one it draws.
THINGS: dict[str, tuple[str, ...]] = {
    "apple": ("red", "big", "green"),
    "bag": ("big", "old", "green"),
    "ball": ("red", "blue", "big"),
    "barn": ("red", "old", "big"),
    "basket": ("big", "old", "little"),
    "bee": ("big", "little"),
    "bell": ("golden", "little", "old"),
    "bike": ("red", "blue", "new"),
    "bird": ("blue", "little", "yellow"),
    "blanket": ("soft", "blue", "red"),
    "board": ("big", "blue", "red"),
    "book": ("big", "old", "new"),
    "box": ("big", "old"),
    "bucket": ("blue", "old"),
    "butterfly": ("blue", "yellow", "pretty"),
    "cake": ("big", "little", "honey"),
    "carrot": ("big", "long"),
    "cave": ("small", "big"),
    "cookie": ("big", "round"),
    "cup": ("blue", "golden", "pretty"),
    "doll": ("little", "pretty", "old"),
    "drum": ("red", "big", "new"),
    "duck": ("little", "yellow"),
    "hat": ("red", "blue", "soft"),
    "hut": ("old", "small"),
    "key": ("golden", "little", "old"),
    "kite": ("red", "blue", "big"),
    "lamp": ("little", "old", "yellow"),
    "lantern": ("little", "old"),
    "log": ("big", "long"),
    "net": ("long", "old"),
    "owl": ("little", "small"),
    "pen": ("blue", "red", "new"),
    "pie": ("big", "round"),
    "plate": ("blue", "big", "pretty"),
    "pot": ("big", "blue", "old"),
    "pumpkin": ("big", "round"),
    "ring": ("golden", "pretty", "little"),
    "sandwich": ("big", "little"),
    "scarf": ("red", "blue", "soft"),
    "scooter": ("red", "blue", "new"),
    "teddy bear": ("soft", "old", "little"),
    "toy boat": ("little", "blue", "red"),
    "toy car": ("red", "blue", "new"),
    "wagon": ("red", "big", "old"),
}

PLACES: dict[str, Place] = {
    "park": Place("in the park", "to the park", ("under a tree", "in the grass", "behind the gate")),
    "garden": Place("in the garden", "to the garden", ("under a bush", "in the grass", "behind the house")),
    "beach": Place("at the beach", "to the beach", ("behind a rock", "in the sand", "next to a boat")),
    "forest": Place("in the forest", "to the forest", ("under a tree", "behind a bush", "next to a log")),
    "meadow": Place("in the meadow", "to the meadow", ("in the grass", "behind a rock", "next to the flowers")),
    "hill": Place("on the hill", "to the hill", ("behind a rock", "under a bush", "next to the old wall")),
    "river": Place("by the river", "to the river", ("under the bridge", "behind a rock", "next to a log")),
    "lake": Place("by the lake", "to the lake", ("behind a rock", "under a tree", "next to a boat")),
    "farm": Place("on the farm", "to the farm", ("behind the barn", "under a tree", "next to the gate")),
    "kitchen": Place("in the kitchen", "to the kitchen", ("under the table", "behind the door", "next to the chair")),
    "bedroom": Place("in the bedroom", "to the bedroom", ("under the bed", "behind the door", "next to the chair")),
    "tent": Place("in the tent", "to the tent", ("under the blanket", "behind the bag", "next to the bed")),
}

# What a template may name besides the cast; a value may use brackets and other slots (see grammar.py).
MACROS: dict[str, str] = {
    "day": "[One day|One morning|One sunny day|One warm day]",
    "intro": "[Once upon a time, there was {a trait} {kind} named {hero}.|"
    "Once upon a time, there was {a trait} {kind} named {hero} who lived {home}.|"
    "{hero} was {a trait} {kind} who lived {home}.|"
    "{hero} was {a trait} {kind}.]",
    "tale": "[a fox who finds a key|a bear who loses a hat|a rabbit who shares a carrot|a boy who mends a kite|"
    "a puppy who learns to swim|a girl who learns to ride a bike|a mouse who is afraid of the dark|"
    "a squirrel who plants a seed|a cat who gives a cake to a friend]",
    "happy": "[happy|very happy]",
    "sad": "[sad|very sad]",
}
