"""llama.cpp's file format: reading, writing, and what its names stand for."""

from slm.interchange.gguf.read import GgufModel
from slm.interchange.gguf.write import GGUF_TYPES, GgufType, write_gguf

__all__ = ["GGUF_TYPES", "GgufModel", "GgufType", "write_gguf"]
