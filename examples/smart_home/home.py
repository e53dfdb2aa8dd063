"""Twelve functions of a house, for `slm chat --tools home.py`. They change nothing: each returns a sentence."""

from typing import Literal

Room = Literal["kitchen", "bedroom", "living room", "bathroom", "office", "hall"]


def set_light(room: Room, on: bool) -> str:
    """Turns a light on or off.

    Args:
        room: The room.
        on: Whether the light is on.
    """
    return f"the light in the {room} is {'on' if on else 'off'}"


def set_brightness(room: Room, percent: int) -> str:
    """Dims a light.

    Args:
        room: The room.
        percent: The brightness, from 0 to 100.
    """
    return f"the light in the {room} is at {percent} %"


def set_colour(room: Room, colour: Literal["white", "red", "blue", "green", "yellow"]) -> str:
    """Changes the colour of a light.

    Args:
        room: The room.
        colour: The colour.
    """
    return f"the light in the {room} is {colour}"


def set_temperature(room: Room, degrees: int) -> str:
    """Sets the heating of a room.

    Args:
        room: The room.
        degrees: The temperature in degrees Celsius, from 10 to 28.
    """
    return f"the {room} is heated to {degrees} degrees"


def set_blinds(room: Room, open: bool) -> str:
    """Opens or closes the blinds.

    Args:
        room: The room.
        open: Whether they are open.
    """
    return f"the blinds in the {room} are {'open' if open else 'closed'}"


def lock_door(door: Literal["front", "back", "garage"], locked: bool) -> str:
    """Locks or unlocks a door.

    Args:
        door: The door.
        locked: Whether it is locked.
    """
    return f"the {door} door is {'locked' if locked else 'unlocked'}"


def play_music(room: Room, style: Literal["jazz", "rock", "classical", "pop", "folk"]) -> str:
    """Plays music.

    Args:
        room: The room.
        style: The style.
    """
    return f"{style} plays in the {room}"


def stop_music(room: Room) -> str:
    """Stops the music.

    Args:
        room: The room.
    """
    return f"the {room} is quiet"


def set_timer(minutes: int) -> str:
    """Starts a timer.

    Args:
        minutes: The time in minutes, from 1 to 120.
    """
    return f"the timer ends in {minutes} minutes"


def set_alarm(hour: int, day: Literal["today", "tomorrow"]) -> str:
    """Sets an alarm clock.

    Args:
        hour: The hour, from 0 to 23.
        day: The day.
    """
    return f"the alarm is set for {hour}:00 {day}"


def start_appliance(appliance: Literal["washing machine", "dishwasher", "dryer", "coffee machine", "robot"]) -> str:
    """Starts an appliance.

    Args:
        appliance: The appliance.
    """
    return f"the {appliance} runs"


def add_to_list(item: str) -> str:
    """Adds an item to the shopping list.

    Args:
        item: The item.
    """
    return f"{item} is on the list"
