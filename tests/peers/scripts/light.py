"""A function for agents, and the arguments with which they called it."""

calls: list[dict[str, object]] = []


def set_light(room: str, level: int) -> str:
    """Sets a light.

    Args:
        room: The room.
        level: In percent.
    """
    calls.append({"room": room, "level": level})
    return f"the light in the {room} is at {level} percent"
