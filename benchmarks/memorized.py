"""How much of what a model writes stands in its training text: the longest passages they share.

    python benchmarks/memorized.py MODEL TRAIN_TEXT HELD_OUT_TEXT [--samples 40] [--tokens 200]

Stories are drawn at temperature 0.8 after "Once upon a time", one seed each. For each the longest run of whole words is
looked up that stands in the training text word for word; so it is for as many held-out stories, cut to the same length,
which nobody copied. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import slm

PROMPT = "Once upon a time"


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    args = parser.parse_args()
    text = normal(args.train.read_text(encoding="utf-8"))
    model = slm.load(args.model)
    stories = [
        PROMPT + model.generate(PROMPT, max_new_tokens=args.tokens, temperature=args.temperature, seed=seed)
        for seed in range(args.samples)
    ]
    held_out = args.held_out.read_text(encoding="utf-8").split("<|endoftext|>")[: args.samples]
    length = round(median(len(story) for story in stories))
    result = {
        "written": figures([normal(story) for story in stories], text),
        "held_out": figures([normal(story.strip()[:length]) for story in held_out], text),
    }
    for name, found in result.items():
        print(f"{name}: longest shared passage {found['longest_words']} words, median {found['median_words']:g}")
        print(f"  {found['longest']!r}")
    print(json.dumps({"samples": args.samples, "tokens": args.tokens, "temperature": args.temperature, **result}))


def normal(text: str) -> str:
    """Returns the words of a text with single spaces between them and around it."""
    return f" {' '.join(text.split())} "


def figures(stories: list[str], text: str) -> dict[str, object]:
    """Returns how long the longest passages are that stories share with a text."""
    passages = [longest_shared(story.split(), text) for story in stories]
    lengths = [len(passage) for passage in passages]
    longest = max(passages, key=len)
    return {"longest_words": len(longest), "median_words": median(lengths), "longest": " ".join(longest)}


def longest_shared(words: list[str], text: str) -> list[str]:
    """Returns the longest run of words that stands in a text; a window that only ever grows is moved over them."""
    best: list[str] = []
    for start in range(len(words)):
        while start + len(best) < len(words):
            candidate = words[start : start + len(best) + 1]
            if f" {' '.join(candidate)} " not in text:
                break
            best = candidate
    return best


if __name__ == "__main__":
    main()
