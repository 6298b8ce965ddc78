"""transformers' Chameleon as an oracle: the same weights under its names."""

import torch
from plain_weights import huggingface_state
from torch.func import functional_call
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

# Built because the class wants one, never run.
TINY_VQ = {
    "embed_dim": 8,
    "num_embeddings": 4,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "resolution": 32,
}


def huggingface_logits(model, weights, tokens):
    """[b, s] to [b, s, vocabulary], differentiable with respect to `weights`.

    The head is applied here: ChameleonForConditionalGeneration.forward overwrites the logits of picture ids.
    """
    oracle = _build(model).eval()
    state = huggingface_state(weights, model)
    assert state.keys() == {name for name, _ in oracle.named_parameters() if ".vqmodel." not in name}
    for name, tensor in state.items():
        assert oracle.get_parameter(name).shape == tensor.shape, name
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    hidden = functional_call(oracle.model, inner, kwargs={"input_ids": tokens, "use_cache": False}).last_hidden_state
    return hidden @ state["lm_head.weight"].T


def _build(model):
    config = ChameleonConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.context_length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        model_parallel_size=model.qk_norm_groups,
        swin_norm=model.norm_order == "swin",
        vocabulary_map={"<image>": 3},
        vq_config=TINY_VQ,
        attn_implementation="eager",
    )
    state = torch.random.get_rng_state()
    oracle = ChameleonForConditionalGeneration(config)
    torch.random.set_rng_state(state)
    return oracle
