"""llama.cpp's GGUF file format: reading, writing, and its names."""

from slm.interchange.gguf.read import GgufModel
from slm.interchange.gguf.write import GgufType, Written, check_gguf_output, write_gguf

__all__ = ["GgufModel", "GgufType", "Written", "check_gguf_output", "write_gguf"]
