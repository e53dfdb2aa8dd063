"""Speed of the filters, and precision and recall of the removal of near duplicates, on text with planted ones.

    python benchmarks/selection.py valid.txt [STORIES]

Every second story gets a copy with 1 to 8 changed words. The truth is the exact Jaccard index of each document with every
earlier one that is kept, over an index of all shingles. Needs the extra data. The last line is JSON.
"""

import json
import random
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from slm.core.text.documents import read_documents
from slm.train.data.selection.language import language
from slm.train.data.selection.minhash import NearDuplicates, shingles, signature
from slm.train.data.selection.quality import fault

THRESHOLD = 0.8
MOST_CHANGES = 8


def planted(stories: list[str]) -> list[str]:
    """Returns the stories, with copies of some after all of them, in which words are changed."""
    draw = random.Random(0)
    words = [word for story in stories for word in story.split()]
    copies = []
    for number, story in enumerate(stories[::2]):
        copy = story.split(" ")
        for place in draw.sample(range(len(copy)), min(len(copy), 1 + number % MOST_CHANGES)):
            copy[place] = draw.choice(words)
        copies.append(" ".join(copy))
    return stories + copies


def most_similar(documents: list[str], removed: set[int]) -> list[float]:
    """Returns the largest exact similarity of each document with an earlier one that is kept."""
    where: dict[str, list[int]] = defaultdict(list)
    sizes, found = [], []
    for number, document in enumerate(documents):
        mine = shingles(document)
        common = Counter(other for shingle in mine for other in where.get(shingle, ()))
        found.append(max((count / (len(mine) + sizes[other] - count) for other, count in common.items()), default=0.0))
        sizes.append(len(mine))
        if number not in removed:
            for shingle in mine:
                where[shingle].append(number)
    return found


def timed(what: str, run: Callable[[str], object], documents: list[str]) -> dict[str, float | str]:
    """Times a function over documents, in processor time; the best of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for document in documents:
            run(document)
        seconds.append(time.process_time() - start)
    characters = sum(map(len, documents))
    result = {
        "what": what,
        "documents_s": round(len(documents) / min(seconds)),
        "megabytes_s": round(characters / min(seconds) / 1e6, 2),
    }
    print(f"{what:<24}{result['documents_s']:>10,} documents/s{result['megabytes_s']:>8} MB/s")
    return result


def main() -> None:
    """Runs the benchmark."""
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    stories = list(islice(read_documents(Path(sys.argv[1])), count))
    documents = planted(stories)
    some = documents[:1000]
    speeds = [timed("quality", fault, some), timed("language", language, some), timed("signature", signature, some)]
    signatures = [signature(document) for document in documents]
    removed = set()
    start = time.process_time()
    with sqlite3.connect(":memory:") as connection:
        near = NearDuplicates(connection, THRESHOLD)
        removed = {number for number, each in enumerate(signatures) if not near.add(each)}
    rate = round(len(documents) / (time.process_time() - start))
    print(f"{'comparison':<24}{rate:>10,} documents/s")
    exact = most_similar(documents, removed)
    right = {number for number, similarity in enumerate(exact) if similarity >= THRESHOLD}
    clear = {number for number, similarity in enumerate(exact) if similarity >= THRESHOLD + 0.05}
    report = {
        "documents": len(documents),
        "planted": len(documents) - len(stories),
        "similar": len(right),
        "removed": len(removed),
        "precision": round(len(removed & right) / len(removed), 4),
        "recall": round(len(removed & right) / len(right), 4),
        "recall_at_0.85": round(len(removed & clear) / len(clear), 4),
        "precision_at_0.75": round(sum(exact[number] >= THRESHOLD - 0.05 for number in removed) / len(removed), 4),
        "least_similarity_removed": round(min(exact[number] for number in removed), 3),
        "comparison_documents_s": rate,
        "speeds": speeds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
