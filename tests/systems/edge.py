"""Runs every command of an edge device in this process, which `hiding` has made like one on another system."""

import contextlib
import importlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import hiding

SYSTEM, MODULES = sys.argv[1], sys.argv[2].split()
hiding.install(SYSTEM)

from slm.cli.main import COMMANDS, main
from slm.core import template
from slm.core.errors import SlmError

DEMANDING = {"type": "string", "pattern": "^" + ".?" * 10_000 + "$"}


def slm(*arguments, stdin=b""):
    """Runs a command. Returns its exit code and its output."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(each) for each in arguments])
        except SystemExit as done:
            code = done.code
    sys.stdin = before
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    print("$", *arguments, "->", code, texts[1][-300:], file=sys.stderr)
    return code, texts[0]


def posted(url, request):
    sent = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def answers(port, found):
    """Asks the server, and then stops it as the system's terminal does."""
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{url}/models", timeout=60) as listed:
                    name = json.loads(listed.read())["data"][0]["id"]
                break
            except OSError:
                time.sleep(0.05)
        request = {"model": name, "prompt": "One day", "max_tokens": 5, "temperature": 0}
        found["text"] = posted(f"{url}/completions", request)
        for kind, schema in (("schema", {"type": "boolean"}), ("demanding", DEMANDING)):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            chat = {
                "model": name,
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 8,
                "response_format": form,
            }
            found[kind] = posted(f"{url}/chat/completions", chat)
    except BaseException as error:
        found["error"] = repr(error)
    os.kill(os.getpid(), hiding.BREAK if SYSTEM == "windows" else signal.SIGINT)


def served():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {}
    threading.Thread(target=answers, args=(port, found), daemon=True).start()
    found["code"] = slm("serve", "--port", port, "--threads", 1, "--slots", 1)[0]
    return found


def refused(source):
    """Renders a template that takes too much, and another one. Returns the reason, the seconds, and the other text."""
    started = time.monotonic()
    try:
        reason = template.render(source, [{"role": "user", "content": "hello"}], {})
    except SlmError as error:
        reason = error.message
    seconds = time.monotonic() - started
    after = template.render("{{ messages[0].content }}", [{"role": "user", "content": "hello"}], {})
    return reason, seconds, after


template.MAX_SECONDS = 0.3  # of processor time: the product has 4
for module in MODULES:
    importlib.import_module(module)
text = Path("text.txt")
text.write_bytes("One day a fox saw a “bird”.\r\nThe bird flew away.\r\n".encode() * 20)
usual = "--max-new-tokens", 5, "--threads", 1
report = {"help": [slm("--help")[0], *(slm(command, "--help")[0] for command in COMMANDS)]}
report["generate"] = slm("generate", "-p", "One day", "--greedy", *usual)
report["piped"] = slm("generate", "-p", "-", "--greedy", *usual, stdin="\ufeffOne\r\nday".encode())
report["chat"] = slm("chat", *usual, stdin=b"\xef\xbb\xbfHi.\r\nAnd then?\r\n/quit\r\n")
report["web"] = slm("web", "--out", "page")[0], len(list(Path("page").rglob("*")))
report["again"] = slm("web", "--out", "page")[0]
report["bench"] = slm("bench", "--rounds", 1, "--prompt", "4", "--new", 4, "--threads", 1, "--json")
report["info"] = slm("info", "--json")
report["doctor"] = slm("doctor", "--json")
report["list"] = slm("list")[0]
report["eval"] = slm("eval", "--data", text, "--threads", 1, "--json")
report["missing"] = slm("info", "C:\\models\\tiny")[0]
report["serve"] = served()
report["time"] = refused("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
report["memory"] = refused(
    "{% set n = namespace(x='a' * 99) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
report["left"] = [path.name for path in Path().iterdir()]
report["refused"] = hiding.REFUSED
print(json.dumps(report))
