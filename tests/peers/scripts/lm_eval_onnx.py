"""Answers requests with lm-evaluation-harness's own backends for onnxruntime, or with slm; the last line printed is JSON.

lm_eval_onnx.py ASKED     [[slm|onnxruntime|onnxruntime-genai, bundle, {kind: [arguments, ...]}], ...]
                          -> [{kind: [answer, ...] or the message of a failure}, ...]
"""

import json
import sys

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import slm
from slm.interchange.harness import HarnessModel


def answers(backend, path, requests):
    if backend == "slm":
        model = HarnessModel(slm.load(path))
    else:
        model = get_model(backend).create_from_arg_string(f"pretrained={path}")
    found = {}
    for kind, each in requests.items():
        instances = [Instance(kind, {}, tuple(arguments), i) for i, arguments in enumerate(each)]
        try:
            found[kind] = getattr(model, kind)(instances)
        except Exception as error:
            found[kind] = str(error)
    return found


found = [answers(*asked) for asked in json.loads(sys.argv[1])]
print(json.dumps(found, default=lambda value: value.item() if isinstance(value, np.generic) else float(value)))
