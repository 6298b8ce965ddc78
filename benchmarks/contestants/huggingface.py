"""Hugging Face's Chameleon, trained as (a) is: its hidden states times its head.

Its own `forward` masks the logits of picture codes, which would make a picture's loss infinite and costs a pass; both
are avoided by calling the inner model. The image tokenizer that comes with it is taken out.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from benchmarks.batches import PeerBatch
from benchmarks.contestants.base import Settings
from benchmarks.contestants.torch_training import TorchTraining
from benchmarks.same_weights import Weights
from benchmarks.shapes import Shape

SMALL_IMAGE_TOKENIZER = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "resolution": 32,
}


class HuggingFace(TorchTraining):
    """See the module."""

    module: ChameleonForConditionalGeneration

    @property
    def title(self) -> str:
        """For the table."""
        return f"transformers {transformers.__version__} Chameleon, SDPA, {self.arithmetic}"

    def logits(self, batch: PeerBatch) -> Tensor:
        """See `TorchTraining.logits`."""
        hidden = self.module.model(input_ids=batch.tokens, attention_mask=batch.visible, use_cache=False)
        return self.module.lm_head(hidden.last_hidden_state)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """See `Contestant.load`."""
        model = self.module.model
        model.embed_tokens.weight.copy_(weights["embedding"])
        model.norm.weight.copy_(weights["norm"])
        self.module.lm_head.weight.copy_(weights["head"])
        for i, layer in enumerate(model.layers):
            layer.input_layernorm.weight.copy_(weights[f"{i}.attention_norm"])
            layer.post_attention_layernorm.weight.copy_(weights[f"{i}.mlp_norm"])
            attention, mlp = layer.self_attn, layer.mlp
            for name in "qkvo":
                getattr(attention, f"{name}_proj").weight.copy_(weights[f"{i}.{name}"])
            for name in ("gate", "up", "down"):
                getattr(mlp, f"{name}_proj").weight.copy_(weights[f"{i}.{name}"])
            for name in ("q_norm", "k_norm"):
                norm = getattr(attention, name)  # [heads, head_dim]: each head has a copy
                norm.weight.copy_(weights[f"{i}.{name}"].expand_as(norm.weight))
                norm.bias.copy_(weights[f"{i}.{name}_bias"].expand_as(norm.bias))


def build(settings: Settings, *, variant: str) -> HuggingFace:
    """The contestant."""
    transformers.logging.set_verbosity_error()
    module = ChameleonForConditionalGeneration(_config(settings.shape)).train()
    del module.model.vqmodel
    for name, parameter in module.named_parameters():
        parameter.is_norm = "norm" in name  # QK-norms are matrices here, and are not decayed either
    return HuggingFace(module, settings, variant=variant)


def _config(shape: Shape) -> ChameleonConfig:
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}  # read by the base class, which its types do not say
    return ChameleonConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_groups,
        max_position_embeddings=shape.sequence_length,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        vocabulary_map={"<image>": 8},
        vq_config=SMALL_IMAGE_TOKENIZER,
        **attention,
    )
