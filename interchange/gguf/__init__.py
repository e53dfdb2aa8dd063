"""llama.cpp's file format: reading, writing, and what its names stand for."""

from slm.interchange.gguf.read import GgufModel
from slm.interchange.gguf.write import GgufType, Written, check_gguf_output, write_gguf

__all__ = ["GgufModel", "GgufType", "Written", "check_gguf_output", "write_gguf"]
