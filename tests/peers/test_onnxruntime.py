"""The oldest versions of onnxruntime that run each target, and those before them that do not."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slm.runtime.decoder import OnnxDecoder

pytestmark = pytest.mark.peer

# Answers the prompts with slm itself.
PROGRAM = """
import json, sys
import onnxruntime, slm

model = slm.load(sys.argv[1])
texts = []
for prompt in json.loads(sys.argv[3]):
    texts.append(model.complete(prompt, max_new_tokens=int(sys.argv[2]), temperature=0).tokens)
print(json.dumps({"version": onnxruntime.__version__, "texts": texts}))
"""


@pytest.mark.parametrize(
    ("version", "name"),
    [("1.23.1", "portable"), ("1.29.0", "float32"), ("1.29.0", "int8"), ("1.29.0", "portable int8")],
)
def test_the_oldest(in_python: Callable[..., str], bundles: Any, version: str, name: str) -> None:
    arguments = (bundles.path(name), bundles.count, json.dumps(bundles.prompts))
    found = json.loads(in_python(PROGRAM, f"onnxruntime-{version}", arguments=arguments).splitlines()[-1])
    assert found == {"version": version, "texts": bundles.greedy(name)}


# The logits of a row, of the graph as it is written and as onnxruntime runs it.
LOGITS = """
import json, sys
from pathlib import Path
import numpy as np
from slm.core.manifest import Bundle
from slm.runtime.decoder import OnnxDecoder

bundle, row = Bundle.open(Path(sys.argv[1])), np.array([json.loads(sys.argv[2])])
print(json.dumps([OnnxDecoder(bundle, optimize=optimize).logits(row).tolist() for optimize in (False, True)]))
"""
# float32, added up in another order.
SAME = 3e-5
# Activations are rounded to 8 bits where products are fused, and by each version in its own way; logits vary by 0.4.
ROUNDED = 0.2


@pytest.mark.parametrize("name", ["portable int8", "portable int4"])
@pytest.mark.parametrize("version", ["1.23.1", "1.29.0"])
def test_quantized_portable_bundles(in_python: Callable[..., str], bundles: Any, version: str, name: str) -> None:
    """Greedy tokens part where the likeliest are nearly as likely, so the logits are compared."""
    row = bundles.prompts[-1]
    arguments = (bundles.path(name), json.dumps(row))
    printed = in_python(LOGITS, f"onnxruntime-{version}", arguments=arguments).splitlines()[-1]
    written, run = (np.array(each) for each in json.loads(printed))
    wanted = OnnxDecoder(bundles.bundles[name], optimize=False).logits(np.array([row]))
    assert np.abs(written - wanted).max() < SAME
    assert np.abs(run - wanted).max() < ROUNDED
    other = OnnxDecoder(bundles.bundles["other portable"]).logits(np.array([row]))
    assert np.abs(other - wanted).max() > ROUNDED  # the control: another window
