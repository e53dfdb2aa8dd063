"""GGUF's names of a Gemma 3 model's tensors and settings, and Hugging Face's.

GGUF stores norm weights with the 1 already added, and shapes with the fastest dimension first.
"""

from slm.core.weights import EMBEDDING, HEAD

ARCHITECTURE = "gemma3"
# Key of slm's licence notices, one by one; other programs show general.license and general.description.
NOTICES_KEY = "slm.notices"
# Key of the version of slm that wrote a file; only such files may be replaced.
VERSION_KEY = "slm.version"

_MODEL = {"token_embd": EMBEDDING, "output_norm": "model.norm.weight", "output": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QUERY_NORM = "self_attn.q_norm.weight"
# llama.cpp derives the scale of attention from the head width, except for the model with this many layers.
_LAYERS_OF_27B = 62


def tensor_names(layers: int) -> dict[str, str]:
    """Returns Hugging Face's names by GGUF's names."""
    names = {f"{short}.weight": full for short, full in _MODEL.items()}
    for i in range(layers):
        names |= {f"blk.{i}.{short}.weight": f"model.layers.{i}.{full}.weight" for short, full in _LAYER.items()}
    return names


def is_query_norm(name: str) -> bool:
    """Returns whether a tensor, by Hugging Face's name, is the norm of a layer's queries."""
    return name.endswith(_QUERY_NORM)


def query_scalar(layers: int, hidden_size: int, heads: int, head_dim: int) -> int:
    """Returns the number whose inverse square root is llama.cpp's scale of attention scores."""
    return hidden_size // heads if layers == _LAYERS_OF_27B else head_dim
