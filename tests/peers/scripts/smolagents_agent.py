"""An agent of smolagents answers a question with a tool through a server's chat completions.

Usage: smolagents_agent.py BASE_URL; prints JSON: the final answer, and the arguments with which the tool was called.
"""

import json
import sys

from light import calls, set_light
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id="random", api_base=sys.argv[1], api_key="none", client_kwargs={"max_retries": 0})
agent = ToolCallingAgent(tools=[tool(set_light)], model=model, max_steps=3, verbosity_level=0)
print(json.dumps({"answer": agent.run("Light in the hall at 40 percent."), "calls": calls}))
