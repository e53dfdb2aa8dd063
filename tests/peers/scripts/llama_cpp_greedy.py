"""Run by the tests with llama.cpp's Python package (xllamacpp): a GGUF file and prompts to greedy tokens."""

import json
import sys

import xllamacpp

file, count, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
# Its caches are in half precision unless told otherwise; what is compared with here is float32.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
ids = []
for prompt in prompts:
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1, "cache_prompt": False}
    made = server.handle_completions(request)
    ids.append([token["id"] for token in made["choices"][0]["logprobs"]["content"]])
print(json.dumps(ids))
