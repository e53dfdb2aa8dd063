"""Opens a bundle's graph on CUDA without loading pip's CUDA libraries first, and prints the provider that it got."""

import sys
from pathlib import Path

import onnxruntime as ort

from slm.core.manifest import Bundle

model = Bundle.open(Path(sys.argv[1])).model_path
session = ort.InferenceSession(str(model), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
print(session.get_providers()[0])
