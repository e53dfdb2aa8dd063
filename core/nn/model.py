"""The Gemma 3 text decoder. Modules and tensors have Hugging Face's names; `export/graph/modules.py` mirrors this file.

Dimensions: B batch, T new positions, S visible positions, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slm.core.config import LayerType, ModelConfig
from slm.core.nn.attention import Attention, Positions
from slm.core.nn.cache import KVCache, LayerCache
from slm.core.nn.flex import BlockMask, window_mask
from slm.core.nn.kernels import attention_kernel, compute_capability, products_dtype
from slm.core.nn.layers import MLP, RMSNorm, ScaledEmbedding
from slm.core.nn.rope import rope_angles


class DecoderLayer(nn.Module):
    """One block: attention and MLP, each with a norm before it and one after it.

    Attributes:
        dropout: Share of each sub-layer's output that training zeroes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = 0.0
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """Maps the residual stream (B, T, D) to itself."""
        x = x + self._dropped(self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions, cache)))
        out: Tensor = x + self._dropped(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))
        return out

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class TextModel(nn.Module):
    """The token embedding, the blocks and the final norm.

    Attributes:
        dropout: Share of the embeddings that training zeroes.
        gradient_checkpointing: Whether the backward pass recomputes each block instead of storing its activations.
        flex: Whether training uses FlexAttention for windows shorter than the text; it skips the scores outside the window.
            Evaluation masks scores instead, because FlexAttention's float32 tiles do not fit into shared memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = 0.0
        self.gradient_checkpointing = False
        self.flex = False
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Maps ids (B, T) to hidden states (B, T, D); see `CausalLM.forward`.

        Rows may pack several texts: `segments` (B, T) has each token's text number, and tokens of different texts do not
        attend to each other. `segments` does not combine with a cache or a mask.
        """
        kinds = self.positions(input_ids, attention_mask, 0 if cache is None else cache.length)
        if segments is not None:
            kinds = {kind: positions.apart(segments) for kind, positions in kinds.items()}
        x = self.embed_tokens(input_ids)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        for i, (kind, layer) in enumerate(zip(self.config.layer_types, self.layers, strict=True)):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, kinds[kind], None, use_reentrant=False)
            else:
                x = layer(x, kinds[kind], None if cache is None else cache.layers[i])
        if cache is not None:
            cache.length += input_ids.shape[1]
        out: Tensor = self.norm(x)
        return out

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, past: int) -> dict[LayerType, Positions]:
        """Returns rotation and mask for each kind of layer in the model.

        Positions count from each row's first valid token. Masks compare indices in the row, so distances are right for rows
        padded on the left, and for rows padded on the right that no further step extends.
        """
        batch, length = input_ids.shape
        device = input_ids.device
        total = past + length
        query_slot = torch.arange(past, total, device=device)
        if attention_mask is None:
            position_ids = query_slot.expand(batch, -1)
        else:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]

        compute, dtype = compute_capability(device), products_dtype(self.norm.weight)
        kinds: dict[LayerType, Positions] = {}
        for kind in set(self.config.layer_types):
            window = self.config.window(self.config.layer_types.index(kind))
            cos, sin = rope_angles(position_ids, self.config.head_dim, self.config.rope_parameters[kind])
            visible = total if window is None else min(total, window - 1 + length)
            mask: Tensor | BlockMask | None
            if past == 0 and attention_mask is None and (window is None or length <= window):
                mask = None  # plain causal attention has the fastest kernels
            elif self.flex and self.training and past == 0 and attention_mask is None and window is not None:
                mask = window_mask(length, window, device)
            else:
                key, query = torch.arange(total - visible, total, device=device), query_slot[:, None]
                seen = query >= key  # (T, S); comparisons take an eighth of the memory of differences
                if window is not None:
                    seen &= query - window < key
                mask = seen[None, None]
                if attention_mask is not None:
                    valid = attention_mask[:, None, None, -visible:].bool()
                    # A padded query attends to itself: a softmax over no key would be NaN.
                    mask = (mask & valid) | (query == key)
            kernel = attention_kernel(
                compute, dtype, self.config.head_dim, masked=mask is not None, flex=isinstance(mask, BlockMask)
            )
            kinds[kind] = Positions(cos, sin, mask, kernel)
        return kinds


class CausalLM(nn.Module):
    """The decoder with its language-model head; the tensors are those of Hugging Face's `Gemma3ForCausalLM`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head share the embedding's table, if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every matrix with N(0, initializer_range) and every norm offset with 0."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        num_logits_to_keep: int = 0,
    ) -> Tensor:
        """Returns logits for the next token at each position.

        Args:
            input_ids: New tokens, int64 (B, T).
            attention_mask: 1 for tokens and 0 for padding, (B, past + T); None when nothing is padded.
            cache: Keys and values of the positions before; extended in place.
            num_logits_to_keep: How many of the last positions to compute; 0 for all.

        Returns:
            Logits (B, T or num_logits_to_keep, V).
        """
        hidden = self.model(input_ids, attention_mask, cache)
        out: Tensor = self.lm_head(hidden[:, -num_logits_to_keep:])
        return out
