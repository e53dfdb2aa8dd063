"""Answers requests as lm-evaluation-harness asks them, or runs its tasks; the last line printed is JSON.

lm_eval_answers.py ours|theirs MODEL BOS REQUESTS     {kind: [arguments, ...]} -> {kind: [answer, ...]}
lm_eval_answers.py cli ARGUMENT...                    slm eval ARGUMENT...
"""

import json
import sys

import numpy as np
from lm_eval.api.instance import Instance

what, *rest = sys.argv[1:]
if what == "cli":
    from slm.cli.main import main

    main(["eval", *rest])
path, bos, requests = rest[0], rest[1] == "bos", json.loads(rest[2])
if what == "ours":
    import slm
    from slm.interchange.harness import HarnessModel

    model = HarnessModel(slm.load(path))
else:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=1, add_bos_token=bos)
answers = {
    kind: getattr(model, kind)([Instance(kind, {}, tuple(arguments), i) for i, arguments in enumerate(each)])
    for kind, each in requests.items()
}
print(json.dumps(answers, default=lambda value: value.item() if isinstance(value, np.generic) else float(value)))
