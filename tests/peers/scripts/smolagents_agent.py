"""An agent of smolagents answers a question with a tool through a server's chat completions.

Usage: smolagents_agent.py BASE_URL; prints JSON: the final answer, and the arguments with which the tool was called.
"""

import json
import sys

from smolagents import OpenAIServerModel, ToolCallingAgent, tool

calls: list[dict[str, object]] = []


@tool
def set_light(room: str, level: int) -> str:
    """Sets a light.

    Args:
        room: The room.
        level: In percent.
    """
    calls.append({"room": room, "level": level})
    return f"the light in the {room} is at {level} percent"


model = OpenAIServerModel(model_id="random", api_base=sys.argv[1], api_key="none", client_kwargs={"max_retries": 0})
agent = ToolCallingAgent(tools=[set_light], model=model, max_steps=3, verbosity_level=0)
print(json.dumps({"answer": agent.run("Light in the hall at 40 percent."), "calls": calls}))
