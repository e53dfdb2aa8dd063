"""Run by the tests with onnxruntime-genai: a bundle and requests to tokens, or to the message that it refuses with.

Each request: {"prompts": rows of ids of one length, "count", "options": of the search, "then": ids appended afterwards,
"rewind": to which length before that}. "texts" are encoded and rendered as chats besides.
"""

import json
import sys

import onnxruntime_genai as og

path, requests, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = og.Model(path)


def answer(prompts, count, options=None, then=None, rewind=None):
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompts), **(options or {}))
    generator = og.Generator(model, params)
    generator.append_tokens(prompts if len(prompts) > 1 else prompts[0])
    write(generator, count)
    if rewind is not None:
        generator.rewind_to(rewind)
    if then is not None:
        generator.append_tokens(then)
        write(generator, count)
    return [[int(token) for token in generator.get_sequence(row)] for row in range(len(prompts))]


def write(generator, count):
    for _ in range(count):
        if generator.is_done():
            break
        generator.generate_next_token()


answers = []
for request in requests:
    try:
        answers.append(answer(**request))
    except Exception as error:
        answers.append(str(error))
tokenizer = og.Tokenizer(model)
found = {"version": og.__version__, "answers": answers, "chats": [], "ids": [], "texts": []}
for text in texts:
    chat = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": text}]), add_generation_prompt=True)
    found["chats"].append([int(token) for token in tokenizer.encode(chat)])
tokenizer.update_options(add_special_tokens="true")
for text in texts:
    ids = tokenizer.encode(text)
    found["ids"].append([int(token) for token in ids])
    found["texts"].append(tokenizer.decode(ids))
print(json.dumps(found))
