"""Run by the tests with transformers 4.57 in place of 5: a checkpoint, perhaps an adapter, to logits and text."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

what, checkpoint, out, *rest = sys.argv[1:]
assert transformers.__version__.startswith("4.57"), transformers.__version__
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
answer = {"version": transformers.__version__, "class": type(model).__name__}
if what == "adapter":
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, rest[0]).eval()
if what == "generate":
    count, prompts = int(rest[0]), json.loads(rest[1])
    answer["ids"] = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=count, do_sample=False)
        answer["ids"].append(made[0, ids.shape[1] :].tolist())
else:
    ids = json.loads(rest[-1])
    with torch.no_grad():
        np.save(out, model(torch.tensor([ids])).logits.numpy())
if what == "logits":
    answer["text ids"] = [tokenizer(text)["input_ids"] for text in ("Once upon a time.", " two  spaces\n", "é 🦊")]
    answer["chat ids"] = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    saved = Path(out).parent / "saved"
    model.save_pretrained(saved, max_shard_size="100kB")
    tokenizer.save_pretrained(saved)
print(json.dumps(answer))
