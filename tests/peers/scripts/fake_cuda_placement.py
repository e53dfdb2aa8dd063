"""Opens a bundle's graph on CUDA with onnxruntime's log at its most verbose: `fake_cuda_placement.py BUNDLE`."""

import sys
from pathlib import Path

import onnxruntime as ort

from slm.core.manifest import Bundle
from slm.runtime.session import load_cuda_libraries, session_options

load_cuda_libraries()
options = session_options(1)
options.log_severity_level, options.log_verbosity_level = 0, 1
model = Bundle.open(Path(sys.argv[1]), trust=True).model_path
ort.InferenceSession(str(model), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
