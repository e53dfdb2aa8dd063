"""The oldest versions of onnxruntime that run each target, and those before them that do not."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.peer

# Answers the prompts with slm itself.
PROGRAM = """
import json, sys
import onnxruntime, slm

model = slm.load(sys.argv[1])
texts = []
for prompt in json.loads(sys.argv[3]):
    model.generate(prompt, max_new_tokens=int(sys.argv[2]), temperature=0)
    texts.append(model.last_run.tokens)
print(json.dumps({"version": onnxruntime.__version__, "texts": texts}))
"""


@pytest.mark.parametrize(("version", "name"), [("1.23.1", "portable"), ("1.29.0", "float32"), ("1.29.0", "int8")])
def test_the_oldest(in_python: Callable[..., str], bundles: Any, version: str, name: str) -> None:
    arguments = (bundles.path(name), bundles.count, json.dumps(bundles.prompts))
    found = json.loads(in_python(PROGRAM, f"onnxruntime-{version}", arguments=arguments).splitlines()[-1])
    assert found == {"version": version, "texts": bundles.greedy(name)}
