"""Named model shapes. A preset is a complete configuration, except that the tokenizer sets the ids of special tokens."""

from slm.core.config import FULL, SLIDING, ModelConfig, RopeParameters, layer_pattern
from slm.core.errors import SlmError

# Gemma 3 (arXiv:2503.19786, section 2): base 10,000 in sliding layers, 1,000,000 in global layers.
_ROPE = {SLIDING: RopeParameters(rope_theta=10_000.0), FULL: RopeParameters(rope_theta=1_000_000.0)}


def _sized(
    vocab_size: int, hidden_size: int, layers: int, kv_heads: int, *, intermediate_size: int, window: int, context: int
) -> ModelConfig:
    """Returns a shape with heads of 64 dimensions, whose total width is `hidden_size`."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=kv_heads,
        head_dim=64,
        sliding_window=window,
        layer_types=layer_pattern(layers),
        rope_parameters=_ROPE,
        query_pre_attn_scalar=64,
        max_position_embeddings=context,
    )


PRESETS: dict[str, ModelConfig] = {
    # google/gemma-3-270m's shape with GPT-2's 50,257 tokens instead of Gemma's 262,144, padded to a multiple of 128;
    # the padding holds the turn tokens.
    "gemma3-270m": ModelConfig(
        vocab_size=50_304,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=layer_pattern(18),
        rope_parameters=_ROPE,
        query_pre_attn_scalar=256,
        max_position_embeddings=32_768,
    ),
    # For children's stories: minutes to hours of training on a laptop's CPU give readable text.
    "stories-4m": ModelConfig(
        vocab_size=4_096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=128,
        layer_types=layer_pattern(6),
        rope_parameters=_ROPE,
        query_pre_attn_scalar=64,
        max_position_embeddings=2_048,
    ),
    # For the demo: learns the shipped sample within a minute on two cores; its window is shorter than the texts.
    "tiny": ModelConfig(
        vocab_size=1_024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=64,
        layer_types=layer_pattern(6),
        rope_parameters=_ROPE,
        query_pre_attn_scalar=64,
        max_position_embeddings=1_024,
    ),
    # A series of sizes, named after the number of parameters, embedding included, within 4 %. Two to five query heads share
    # a key-value head. The MLP is three times as wide as the residual stream (SmolLM2: 2.7, Qwen3 0.6B: 3, Llama 3.2 1B: 4),
    # in the smallest twice. The vocabulary grows with the model up to GPT-2's, or the embedding would dominate small models.
    "1m": _sized(1_024, 128, 6, 1, intermediate_size=256, window=64, context=1_024),
    "10m": _sized(4_096, 256, 12, 1, intermediate_size=768, window=128, context=2_048),
    "30m": _sized(8_192, 384, 15, 2, intermediate_size=1_152, window=128, context=2_048),
    "100m": _sized(50_304, 640, 15, 2, intermediate_size=1_920, window=512, context=32_768),
    "270m-wide": _sized(50_304, 1_024, 18, 4, intermediate_size=3_072, window=512, context=32_768),
    "1b": _sized(50_304, 1_792, 24, 7, intermediate_size=5_376, window=512, context=32_768),
}


def preset(name: str) -> ModelConfig:
    """Returns a preset by name.

    Raises:
        SlmError: If no preset has this name.
    """
    if name not in PRESETS:
        raise SlmError(f"no preset is called {name!r}", f"the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
