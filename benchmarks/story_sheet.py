"""A fixed sheet of twenty beginnings, and whether a model's stories keep the characters in them.

    python benchmarks/story_sheet.py MODEL [--markdown FILE]

Each beginning names one or two characters. The model continues it until the end of the text or for `--tokens` tokens, at one
temperature, with the number of the beginning as seed: no story is chosen. A character is kept if its name occurs in the second
half of the continuation. The last line is one JSON object; `--markdown` writes all stories for a model card.
"""

import argparse
import json
import re
from pathlib import Path

import slm

# Beginnings with the names of their characters.
SHEET: list[tuple[str, list[str]]] = [
    ("Once upon a time, there was a little girl named Lily. Her cat Tom was", ["Lily", "Tom"]),
    ("Ben and Mia went to the park with a red ball.", ["Ben", "Mia"]),
    ("Max was a big dog who liked to dig. One day, Max found", ["Max"]),
    ("Sara and her brother Tim wanted to bake a cake for", ["Sara", "Tim"]),
    ("There was a small bird named Pip who could not fly.", ["Pip"]),
    ("Anna lost her favorite doll. She asked her friend Jack to", ["Anna", "Jack"]),
    ("One rainy day, Leo looked out of the window and saw", ["Leo"]),
    ("Once there was an old man named Bob. He had a boat and", ["Bob"]),
    ("Lucy and Sam found a box in the garden. Inside the box", ["Lucy", "Sam"]),
    ("The bear was hungry. A little rabbit named Fluffy said", ["Fluffy"]),
    ("Tom did not want to share his toys with Sue.", ["Tom", "Sue"]),
    ("Mom gave Emma a blue hat. Emma was happy because", ["Emma"]),
    ("Once upon a time, a frog named Fred lived near a pond with a duck named Daisy.", ["Fred", "Daisy"]),
    ("Jack climbed the tall tree. He was scared when", ["Jack"]),
    ("Amy and Ella were playing by the sea when a wave", ["Amy", "Ella"]),
    ("A boy named Billy had a toy car that was broken.", ["Billy"]),
    ("It was cold outside. Kitty the kitten wanted to", ["Kitty"]),
    ("Mia was sad because Ben took her book. Mia said", ["Mia", "Ben"]),
    ("Spot the puppy saw a big truck. Spot ran to", ["Spot"]),
    ("On her birthday, Zoe got a present from Grandpa. It was", ["Zoe", "Grandpa"]),
]


def main() -> None:
    """Prints which characters each story keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--markdown", type=Path, help="write the stories to this file")
    args = parser.parse_args()
    model = slm.load(args.model)
    stories, found = [], 0
    for seed, (beginning, names) in enumerate(SHEET):
        text = model.generate(beginning, max_new_tokens=args.tokens, temperature=args.temperature, seed=seed)
        missing = [name for name in names if not in_second_half(text, name)]
        found += len(names) - len(missing)
        stories.append((beginning, text, missing))
        print(f"{seed:2} {beginning!r}: {'lost ' + ', '.join(missing) if missing else 'kept'}")
    if args.markdown:
        args.markdown.write_text("\n\n".join(quoted(*story) for story in stories) + "\n", encoding="utf-8", newline="")
    result = {
        "stories": len(SHEET),
        "stories_with_all_characters": sum(not missing for _, _, missing in stories),
        "characters": sum(len(names) for _, names in SHEET),
        "characters_kept": found,
        "tokens": args.tokens,
        "temperature": args.temperature,
    }
    print(json.dumps(result))


def in_second_half(text: str, name: str) -> bool:
    """Returns whether a name occurs as a word in the second half of a text's words."""
    words = re.findall(r"\w+", text)
    return name in words[len(words) // 2 :]


def quoted(beginning: str, text: str, missing: list[str]) -> str:
    """Returns a story as a quotation, its beginning in bold."""
    story = " ".join(f"**{beginning}**{text}".split())
    return f"> {story}" + (f" *(lost: {', '.join(missing)})*" if missing else "")


if __name__ == "__main__":
    main()
