"""How a tuned model answers instructions that it was not trained on: whether answers end by themselves, and how long they are.

    python benchmarks/instruct.py MODEL ROWS.json [--new 256] [--show 3]

ROWS has {"instruction", "input", "output"} objects, a JSON array or one a line. Greedy. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import slm
from slm.core.chat import turn_ids


def main() -> None:
    """Asks for every answer and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--new", type=int, default=256, help="new tokens at most")
    parser.add_argument("--show", type=int, default=3, help="answers to print")
    args = parser.parse_args()
    text = args.rows.read_text(encoding="utf-8")
    rows = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    model = slm.load(args.model)
    stopped, lengths = 0, []
    for index, row in enumerate(rows):
        request = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        answer = model.complete(turn_ids(model.tokenizer, request), max_new_tokens=args.new, temperature=0.0)
        stopped += answer.stopped == "end"
        lengths.append(len(answer.tokens))
        if index < args.show:
            print(f"> {request}\n{answer.text}\n")
    found = {
        "rows": len(rows),
        "ended_by_themselves": round(stopped / len(rows), 4),
        "median_tokens": median(lengths),
        "limit": args.new,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
