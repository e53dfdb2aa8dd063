"""Write the sample files: `python -m slm.train.stories.generate [--out DIR] [--seed N]`.

The default seed writes the files that ship, byte for byte; a test holds it to that.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from slm.core import sample
from slm.train.stories.grammar import Story, shuffled, tell
from slm.train.stories.pairs import Pair, make_pairs
from slm.train.stories.plots import PLOTS

SEED = 7
TRAIN_BYTES = 440_000
VALIDATION_BYTES = 45_000
PAIRS = 480


def make_stories(rng: random.Random, size: int, fresh: Callable[[Story], bool]) -> list[Story]:
    """Tell stories until they fill `size` bytes, going round the plots in a new order each time.

    Args:
        rng: The source of every draw.
        size: Bytes of ASCII text to reach, separators included.
        fresh: Whether a story may be used; one that may not is told anew.
    """
    stories: list[Story] = []
    total = 0
    while True:
        for plot in shuffled(rng, PLOTS):
            while not fresh(story := tell(rng, plot)):
                pass
            stories.append(story)
            total += len(render([story]))
            if total >= size:
                return stories


def make_split(seed: int = SEED) -> tuple[list[Story], list[Story]]:
    """The training and the validation stories: no two share a text, and the two parts share no `Story.key`."""
    rng = random.Random(seed)
    texts: set[str] = set()
    held_out: set[tuple[str, str, str, str]] = set()

    def fresh(story: Story) -> bool:
        if story.text in texts or story.key in held_out:
            return False
        texts.add(story.text)
        return True

    validation = make_stories(rng, VALIDATION_BYTES, fresh)
    held_out.update(story.key for story in validation)
    return make_stories(rng, TRAIN_BYTES, fresh), validation


def render(stories: list[Story]) -> str:
    """The text of a file of stories."""
    return "".join(f"{story.text}\n{sample.SEPARATOR}\n" for story in stories)


def render_pairs(pairs: list[Pair]) -> str:
    """The text of a file of rows."""
    return "".join(json.dumps({"instruction": pair.instruction, "output": pair.output}) + "\n" for pair in pairs)


def write(out: Path, seed: int = SEED) -> None:
    """Write `stories.txt`, `validation.txt` and `pairs.jsonl` into `out`."""
    train, validation = make_split(seed)
    for path, text in (
        (sample.stories_path(), render(train)),
        (sample.validation_path(), render(validation)),
        (sample.pairs_path(), render_pairs(make_pairs(random.Random(seed), PAIRS))),
    ):
        (out / path.name).write_bytes(text.encode("ascii"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the sample stories and instruction pairs.")
    parser.add_argument("--out", type=Path, default=sample.stories_path().parent, help="an existing directory")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s, the files that ship")
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
