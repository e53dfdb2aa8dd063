"""Run by the tests with optimum: bundles and batches of prompts to greedy tokens, shorter rows padded on the left.

optimum_greedy.py COUNT ASKED     {bundle: [batch, ...]} -> its versions, and {bundle: [tokens, ...] or a message}
"""

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM

count, asked = int(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)


def answer(model, prompts):
    longest, pad = max(map(len, prompts)), model.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return made[:, longest:].tolist()


answers = {}
for path, batches in asked.items():
    model = ORTModelForCausalLM.from_pretrained(path)
    assert not model.use_io_binding
    try:
        answers[path] = [answer(model, prompts) for prompts in batches]
    except Exception as error:
        answers[path] = str(error)
versions = [version(name) for name in ("optimum-onnx", "optimum", "transformers")]
print(json.dumps({"versions": versions, "answers": answers}))
