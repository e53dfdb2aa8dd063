"""Agents of smolagents answer a question with a tool through a server's chat completions, one of them streamed.

Usage: smolagents_agent.py BASE_URL; prints JSON: the final answers, and the arguments with which the tool was called.
"""

import json
import sys

from light import calls, set_light
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id="random", api_base=sys.argv[1], api_key="none", client_kwargs={"max_retries": 0})
found = {}
for name, stream in (("answer", False), ("streamed", True)):
    agent = ToolCallingAgent(
        tools=[tool(set_light)], model=model, max_steps=3, verbosity_level=0, stream_outputs=stream
    )
    found[name] = agent.run("Light in the hall at 40 percent.")
print()  # a streamed answer is shown on the terminal, without the end of its line
print(json.dumps(found | {"calls": calls}))
