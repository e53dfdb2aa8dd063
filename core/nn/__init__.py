"""The model in PyTorch; every exported graph is verified against it."""

from slm.core.nn.cache import KVCache
from slm.core.nn.checkpoint import load_checkpoint, save_checkpoint
from slm.core.nn.model import CausalLM

__all__ = ["CausalLM", "KVCache", "load_checkpoint", "save_checkpoint"]
