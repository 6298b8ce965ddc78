import pytest
import torch

from megachameleon.config import KernelsConfig, ParallelConfig, load_config
from megachameleon.config.kernels import OPERATIONS
from megachameleon.parallel.context import parallel_context


@pytest.fixture(scope="module", autouse=True)
def context():
    with parallel_context(ParallelConfig()) as context:
        yield context


def build(context, *overrides, kernels="auto", seed=1):
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels

    config = load_config("debug", list(overrides))
    chosen = choose_kernels(KernelsConfig(**dict.fromkeys(OPERATIONS, kernels)))
    return build_decoder(
        config.model, config.parallel, chosen, context.groups, dtype=torch.float32, seed=seed
    ), config.model


def logits(model, tokens, documents=None):
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    return model(tokens, positions, documents)


VARIANTS = {
    "pre": [],
    "swin": ["model.norm_order=swin"],
    "two groups": ["model.qk_norm_groups=2"],
    "rmsnorm": ["model.qk_norm=rmsnorm", "model.qk_norm_groups=2"],
    "no qk-norm": ["model.qk_norm=none"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_the_formula_says(context, variant):
    model, config = build(context, *VARIANTS[variant])
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_kernels_give_the_logits_of_the_plain_ones(context, variant):
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 10 + [1] * 22, [0] * 20 + [-1] * 12], dtype=torch.int32)
    outputs = []
    for kernels in ("torch", "reference"):
        model, _ = build(context, *VARIANTS[variant], kernels=kernels)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)) * len(name) / 40)
        outputs.append(logits(model, tokens, documents))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert outputs[0].std() > 0.05


def test_a_document_in_a_pack_gives_the_logits_that_it_gives_alone(context):
    model, _ = build(context)
    tokens = torch.randint(0, 128, (1, 32), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 10 + [1] * 22], dtype=torch.int32)
    packed = logits(model, tokens, documents)
    torch.testing.assert_close(packed[:, 10:], logits(model, tokens[:, 10:]), rtol=1e-4, atol=1e-5)
    assert (packed[:, 10:] - logits(model, tokens)[:, 10:]).abs().max() > 1e-3


def test_groups_of_heads_have_their_own_qk_norm(context):
    model, _ = build(context, "model.qk_norm_groups=2")
    tokens = torch.randint(0, 128, (1, 16), generator=torch.Generator().manual_seed(0))
    before = logits(model, tokens)
    weight = model.decoder.layers[0].self_attention.q_layernorm.weight
    assert weight.shape == (2 * 8,)
    norm = model.decoder.layers[0].self_attention.q_layernorm
    x = torch.randn(4, 1, 4, 8)
    plain = norm(x)
    with torch.no_grad():
        weight[8:] *= 3
    changed = norm(x)
    torch.testing.assert_close(changed[:, :, :2], plain[:, :, :2])
    torch.testing.assert_close(changed[:, :, 2:], 3 * plain[:, :, 2:])
    assert (logits(model, tokens) - before).abs().max() > 1e-5


def test_the_norm_orders_differ_where_the_paper_says(context):
    """Swin: x + norm(f(x)). With all norm weights zero every block is the identity; pre-norm's is too, but its first
    sublayer then reads zeros, so only the Swin branch ignores what the sublayer computes."""
    model, _ = build(context, "model.norm_order=swin")
    names = [name for name, _ in model.named_parameters()]
    assert "decoder.layers.0.self_attn_bda.norm.weight" in names
    assert not any("input_layernorm" in name for name in names)
    hidden = torch.randn(6, 1, 32)
    layer = model.decoder.layers[0]
    with torch.no_grad():
        layer.self_attn_bda.norm.weight.zero_()
        layer.mlp_bda.norm.weight.zero_()
    inputs = model._attention_inputs(torch.zeros(1, 6), None, None, None)
    output, _ = layer(hidden, attention_mask=None, packed_seq_params=inputs)
    torch.testing.assert_close(output, hidden)


def test_dropout_spares_the_embedding(context):
    model, _ = build(context, "model.dropout=0.5")
    assert model.embedding.embedding_dropout.p == 0.0
    tokens = torch.randint(0, 128, (1, 16))
    model.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))
    model.eval()
    assert torch.equal(logits(model, tokens), logits(model, tokens))


def test_initial_weights_follow_the_seed_and_the_depth(context):
    model, config = build(context, "model.hidden_size=64", "model.ffn_hidden_size=256")
    again, _ = build(context, "model.hidden_size=64", "model.ffn_hidden_size=256")
    other, _ = build(context, "model.hidden_size=64", "model.ffn_hidden_size=256", seed=2)
    weight = model.decoder.layers[0].mlp.linear_fc2.weight
    assert torch.equal(weight, again.decoder.layers[0].mlp.linear_fc2.weight)
    assert not torch.equal(weight, other.decoder.layers[0].mlp.linear_fc2.weight)
    assert not torch.equal(weight, model.decoder.layers[1].mlp.linear_fc2.weight)
    assert weight.std().item() == pytest.approx(0.02 / (2 * config.num_layers) ** 0.5, rel=0.05)
    assert model.decoder.layers[0].mlp.linear_fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
