"""Writes the rows of the smart home: requests, and the calls of `home.py`'s functions that fulfil them.

    python rows.py [--train 1500] [--test 200] [--seed 0] [--out .]        -> train.jsonl, test.jsonl

Most rows are one call in one of several wordings, one row in six is two calls, and one in eight is a request that no function
fulfils, with a sentence as the answer. A third of the training rows with calls goes on with their results and an answer that
repeats them. No request is in both files, but both use the same wordings. The rows declare no tools: the model learns them by
heart, so its prompts are short.
"""

import argparse
import json
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# By its path: with PYTHONSAFEPATH, Python does not import from the directory of a program.
HOME = runpy.run_path(str(Path(__file__).with_name("home.py")))

ROOMS = ("kitchen", "bedroom", "living room", "bathroom", "office", "hall")
COLOURS = ("white", "red", "blue", "green", "yellow")
STYLES = ("jazz", "rock", "classical", "pop", "folk")
DOORS = ("front", "back", "garage")
APPLIANCES = ("washing machine", "dishwasher", "dryer", "coffee machine", "robot")
ITEMS = (
    "milk", "bread", "eggs", "apples", "rice", "cheese", "tea", "soap", "butter", "pasta", "honey", "salt", "paper", "nuts",
    "lemons", "onions", "fish", "juice", "flour", "jam",
)  # fmt: skip
REFUSED = (
    "order a pizza", "call my mother", "book a flight", "write a poem", "feed the cat", "water the garden", "buy a car",
    "send an email", "tell me a joke", "paint the wall", "wash the car", "find my keys", "translate a letter", "do my homework",
    "check the news", "pay the rent", "cut the grass", "cook dinner", "walk the dog", "fix the roof", "read my mail",
    "clean the windows", "sing a song", "make the bed", "iron a shirt",
)  # fmt: skip
REFUSAL = "Sorry, I cannot do that. I can only control the house."

Call = tuple[str, dict[str, Any]]
Draw = Callable[[random.Random], tuple[str, Call]]


def pick(r: random.Random, *wordings: str) -> str:
    """Returns one of several wordings."""
    return r.choice(wordings)


def light(r: random.Random) -> tuple[str, Call]:
    """A light that goes on or off."""
    room, on = r.choice(ROOMS), r.random() < 0.5
    state = "on" if on else "off"
    text = pick(
        r, f"turn {state} the light in the {room}", f"turn the {room} light {state}", f"switch the light in the {room} {state}",
        f"lights {state} in the {room}",
    )  # fmt: skip
    return text, ("set_light", {"room": room, "on": on})


def brightness(r: random.Random) -> tuple[str, Call]:
    """A light that is dimmed."""
    room, percent = r.choice(ROOMS), r.randrange(5, 100, 5)
    text = pick(
        r, f"dim the light in the {room} to {percent} percent", f"set the {room} light to {percent} percent",
        f"brightness {percent} in the {room}",
    )  # fmt: skip
    return text, ("set_brightness", {"room": room, "percent": percent})


def colour(r: random.Random) -> tuple[str, Call]:
    """A light that changes its colour."""
    room, shade = r.choice(ROOMS), r.choice(COLOURS)
    text = pick(
        r, f"make the {room} light {shade}", f"change the light in the {room} to {shade}", f"{shade} light in the {room}"
    )  # fmt: skip
    return text, ("set_colour", {"room": room, "colour": shade})


def temperature(r: random.Random) -> tuple[str, Call]:
    """A room that is heated."""
    room, degrees = r.choice(ROOMS), r.randint(10, 28)
    text = pick(
        r, f"heat the {room} to {degrees} degrees", f"set the {room} to {degrees} degrees",
        f"I want {degrees} degrees in the {room}",
    )  # fmt: skip
    return text, ("set_temperature", {"room": room, "degrees": degrees})


def blinds(r: random.Random) -> tuple[str, Call]:
    """Blinds that open or close."""
    room, opened = r.choice(ROOMS), r.random() < 0.5
    verb = "open" if opened else "close"
    text = pick(
        r, f"{verb} the blinds in the {room}", f"{verb} the {room} blinds", f"blinds in the {room}: {verb} them"
    )
    return text, ("set_blinds", {"room": room, "open": opened})


def door(r: random.Random) -> tuple[str, Call]:
    """A door that is locked or unlocked."""
    which, locked = r.choice(DOORS), r.random() < 0.5
    verb = "lock" if locked else "unlock"
    text = pick(r, f"{verb} the {which} door", f"can you {verb} the {which} door", f"the {which} door: {verb} it")
    return text, ("lock_door", {"door": which, "locked": locked})


def music(r: random.Random) -> tuple[str, Call]:
    """Music that starts."""
    room, style = r.choice(ROOMS), r.choice(STYLES)
    text = pick(
        r, f"play {style} in the {room}", f"I want to hear {style} in the {room}", f"some {style} in the {room}",
        f"put on {style} music in the {room}",
    )  # fmt: skip
    return text, ("play_music", {"room": room, "style": style})


def silence(r: random.Random) -> tuple[str, Call]:
    """Music that stops."""
    room = r.choice(ROOMS)
    text = pick(r, f"stop the music in the {room}", f"no more music in the {room}", f"make the {room} quiet")
    return text, ("stop_music", {"room": room})


def timer(r: random.Random) -> tuple[str, Call]:
    """A timer."""
    minutes = r.randint(1, 120)
    text = pick(
        r, f"set a timer for {minutes} minutes", f"timer, {minutes} minutes", f"remind me in {minutes} minutes",
        f"start a {minutes} minute timer",
    )  # fmt: skip
    return text, ("set_timer", {"minutes": minutes})


def alarm(r: random.Random) -> tuple[str, Call]:
    """An alarm clock."""
    hour, day = r.randint(0, 23), r.choice(("today", "tomorrow"))
    text = pick(r, f"wake me at {hour} {day}", f"set an alarm for {hour} o'clock {day}", f"alarm {day} at {hour}")
    return text, ("set_alarm", {"hour": hour, "day": day})


def appliance(r: random.Random) -> tuple[str, Call]:
    """An appliance that starts."""
    which = r.choice(APPLIANCES)
    text = pick(r, f"start the {which}", f"turn on the {which}", f"run the {which}", f"let the {which} run")
    return text, ("start_appliance", {"appliance": which})


def shopping(r: random.Random) -> tuple[str, Call]:
    """An item for the shopping list."""
    item = r.choice(ITEMS)
    text = pick(
        r, f"add {item} to the shopping list", f"we need {item}", f"put {item} on the list", f"I have to buy {item}"
    )  # fmt: skip
    return text, ("add_to_list", {"item": item})


DRAWS: tuple[Draw, ...] = (
    light, brightness, colour, temperature, blinds, door, music, silence, timer, alarm, appliance, shopping
)  # fmt: skip


def row(r: random.Random) -> tuple[str, dict[str, Any]]:
    """Returns a request and its answer, a message."""
    if r.random() < 1 / 8:
        text = pick(r, "{}", "please {}", "can you {}").format(r.choice(REFUSED))
        return polite(r, text), {"role": "assistant", "content": REFUSAL}
    drawn = [draw(r) for draw in (r.sample(DRAWS, 2) if r.random() < 1 / 6 else [r.choice(DRAWS)])]
    text = pick(r, " and ", ", and ", ", then ").join(words for words, _ in drawn)
    calls = [
        {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for _, (name, arguments) in drawn
    ]
    return polite(r, text), {"role": "assistant", "content": "", "tool_calls": calls}


def with_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a request and its calls with the results of the calls and an answer to them; without calls, the same."""
    results = []
    for call in messages[-1].get("tool_calls", ()):
        function = call["function"]
        results.append(str(HOME[function["name"]](**json.loads(function["arguments"]))))
    if not results:
        return messages
    told = ", and ".join(results)
    answer = {"role": "assistant", "content": f"{told[0].upper()}{told[1:]}."}
    return [*messages, *({"role": "tool", "content": each} for each in results), answer]


def polite(r: random.Random, text: str) -> str:
    """Returns a request as people write it."""
    before, after = pick(r, "", "", "", "please ", "hey, "), pick(r, "", "", ".", " please", " now")
    text = f"{before}{text}{after}"
    return text[0].upper() + text[1:] if r.random() < 0.5 else text


def rows(train: int, test: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the training rows and the test rows; no request is in both, in any capitals."""
    r, seen, found = random.Random(seed), set(), []
    while len(found) < train + test:
        text, answer = row(r)
        if text.lower() not in seen:
            seen.add(text.lower())
            found.append({"messages": [{"role": "user", "content": text}, answer]})
    answered = random.Random(seed + 1)
    learned = [
        {"messages": with_results(each["messages"])} if answered.random() < 1 / 3 else each for each in found[test:]
    ]
    return learned, found[:test]


def count(text: str) -> int:
    """Returns a number of rows.

    Raises:
        ValueError: When it is not a number, or negative; argparse names the option.
    """
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def main() -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=count, default=1500, help="training rows")
    parser.add_argument("--test", type=count, default=200, help="test rows")
    parser.add_argument("--seed", type=int, default=0, help="draws other rows")
    parser.add_argument("--out", type=Path, default=Path(), help="the directory, which is created")
    given = parser.parse_args()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    for name, written in zip(("train", "test"), rows(given.train, given.test, given.seed), strict=True):
        path = given.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in written), encoding="utf-8", newline="")
        sys.stderr.write(f"{path}: {len(written)} rows\n")


if __name__ == "__main__":
    main()
