"""Type checkers and the public API: a correct script passes mypy, and each mistake in another script is found."""

import os
import subprocess
import sys
from pathlib import Path

RIGHT = """
from pathlib import Path

import slm

model = slm.load("runs/tiny/onnx", device="cpu", threads=2)
text: str = model.generate("The", temperature=0.5, max_new_tokens=3, stop="x")
of_ids: str = model.generate([1, 2], seed=None)
texts: list[str] = model.generate(["The", "A"], seed=3)
for piece in model.pieces("The", logprobs=3):
    print(piece.text, piece.token, piece.logprob)
for part in model.stream("The", on_full="slide", keep=3):
    print(part.upper())
chat: slm.Chat = model.chat(system="a", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
answer: str = chat.ask("Hi.", top_k=3)
options: slm.GenerationOptions = {"temperature": 0, "max_new_tokens": 8}
answer = chat.retry(**options)
stream = model.stream("The")
print("".join(stream), stream.result.seed)
result: slm.Result = model.complete("The")
results: list[slm.Result] = model.complete(["The", "A"])
print(result.seed, result.stopped, [each.text for each in results])
trained: slm.TrainResult = slm.train(data=["a.txt", Path("b")], set={"seed": 1})
tuned: slm.FinetuneResult = slm.finetune("rows.jsonl", epochs=3, keep="last", progress=False)
exported: slm.ExportResult = slm.export(tuned, "onnx", context=64)
small: slm.QuantizeResult = slm.quantize(exported, "int4", block_size=32)
scores: slm.Comparison = slm.evaluate([trained, tuned, small, "x"], task="rows.jsonl", metric="exact", min=0.5)
loss: slm.TextResult = slm.evaluate(small, data=Path("a.txt"), protocol="windows")
both: dict[str, float] = scores.scores
model = slm.load(small)
try:
    slm.load(Path("x"), adapter=Path("y"))
except slm.SlmError as error:
    print(error.message, error.hint)
"""
WRONG = """
import slm

model = slm.load()
model.generate("The", max_tokens=3)
model.generate("The", temperature="hot")
text: str = model.generate(["The"])
slm.load(devise="cuda")
slm.load(device="gpu")
model.chat().ask("Hi.", topk=3)
slm.finetune("rows.jsonl", epoch=3)
slm.quantize("x", "int3")
slm.evaluate("x", task="rows.jsonl", protocol="windows")
slm.train(data=3)
"""

# What slm's own types do not mention. To read PyTorch's takes most of a minute.
UNREAD = "torch transformers peft datasets pyarrow onnx onnxscript onnx_ir onnxruntime safetensors huggingface_hub matplotlib"
CONFIGURATION = f"""
[mypy]
strict = True
[mypy-{",".join(f"{name}.*" for name in UNREAD.split())}]
follow_imports = skip
"""


def test_types_are_seen() -> None:
    for name, text in (("right.py", RIGHT), ("wrong.py", WRONG), ("mypy.ini", CONFIGURATION)):
        Path(name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--config-file", "mypy.ini"]
    command += ["--cache-dir", os.devnull, "right.py", "wrong.py"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    errors = {(line.split(":")[0], int(line.split(":")[1])) for line in found.splitlines() if ": error:" in line}
    assert errors == {("wrong.py", line) for line in range(5, 15)}, found
    assert 'did you mean "max_new_tokens"' in found
