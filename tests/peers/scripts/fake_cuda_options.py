"""Opens a bundle on CUDA as slm does, and prints the provider's options: `fake_cuda_options.py BUNDLE`."""

import json
import sys
from pathlib import Path

from slm.core.manifest import Bundle
from slm.runtime.session import open_session

session = open_session(Bundle.open(Path(sys.argv[1])), "cuda", threads=1)
print(json.dumps(session.get_provider_options()["CUDAExecutionProvider"]))
