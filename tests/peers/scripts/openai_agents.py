"""An agent of OpenAI's framework answers a question with a function tool through a server's chat completions.

Usage: openai_agents.py BASE_URL; prints JSON: the final answer, and the arguments with which the tool was called.
"""

import asyncio
import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from light import calls, set_light
from openai import AsyncOpenAI

set_tracing_disabled(True)


async def main() -> None:
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    model = OpenAIChatCompletionsModel(model="random", openai_client=client)
    agent = Agent(name="Home", instructions="Be brief.", tools=[function_tool(set_light)], model=model)
    result = await Runner.run(agent, "Light in the hall at 40 percent.", max_turns=4)
    answered = result.final_output
    stream = Runner.run_streamed(agent, "Light in the hall at 40 percent.", max_turns=4)
    kinds = [event.type async for event in stream.stream_events()]
    print(
        json.dumps({"answer": answered, "streamed": stream.final_output, "calls": calls, "events": sorted(set(kinds))})
    )


asyncio.run(main())
