"""Verification: equal models agree to rounding, each known mistake of a conversion shows by more than 0.1."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from converting import CASES, VOCABULARY, convert_checkpoint, save_filled
from meta_oracle import NORMS, ROWS, halves_apart, meta_logits
from meta_writer import write_meta
from plain_weights import draw
from safetensors.torch import load_file, save_file

from megachameleon.checkpoint.verifying.verification import Side, logits_of, some_tokens, verify
from megachameleon.config import load_config

transformers = pytest.importorskip("transformers", reason="one side of the comparison")


class Formats:
    """The same model in all three formats: Meta's written by the facts about it, the others by our own code."""

    def __init__(self, overrides, folder):
        self.model = load_config("debug", overrides).model
        self.weights = draw(self.model, seed=2)  # in Meta's order of dimensions
        shards = self.model.qk_norm_groups
        ours = save_filled(overrides, halves_apart(self.weights, *ROWS, *NORMS), folder / "ours")
        self.paths = {
            "meta": write_meta(folder / "meta", self.model, self.weights, shards=shards, vocabulary=VOCABULARY),
            "megatron": ours,
            "hf": convert_checkpoint(("megatron", "hf"), ours, folder / "hf"),
        }

    def compare(self, one, other, rounding=torch.float32, path=None):
        """`path` stands for that of `other`."""
        sides = Side(kind=one, path=self.paths[one]), Side(kind=other, path=path or self.paths[other])
        (found,) = verify(sides[0], sides[1:], self.model, VOCABULARY, rounding)
        return found


@pytest.fixture(scope="module", params=CASES)
def formats(request, tmp_path_factory):
    return Formats(CASES[request.param], tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize(("one", "other"), [("meta", "megatron"), ("megatron", "hf"), ("meta", "hf")])
def test_equal_models_agree(formats, one, other):
    found = formats.compare(one, other)
    assert found.is_same and found.difference < 1e-5
    assert found.same_choice == found.num_tokens == 128
    assert [name for name, _ in found.by_part] == ["embedding", "block 0", "block 1", "final norm"]
    assert max(difference for _, difference in found.by_part) < 1e-5


def test_metas_formula_is_that_of_the_oracle(formats):
    tokens = some_tokens(128, VOCABULARY)
    logits = logits_of("meta", formats.paths["meta"], tokens, torch.float32)
    torch.testing.assert_close(logits, meta_logits(formats.model, formats.weights, tokens), rtol=0, atol=1e-5)
    assert 0.5 < logits.std() < 2


def test_a_streamed_model_is_the_whole_one_to_the_bit(formats):
    from megachameleon.checkpoint.folder import resolve_checkpoint
    from megachameleon.checkpoint.loading import load_checkpoint, saved_config
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels
    from megachameleon.parallel.context import parallel_context

    tokens = some_tokens(128, VOCABULARY)
    with torch.no_grad():
        theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(formats.paths["hf"]).eval()
        expected = theirs.lm_head(theirs.model(input_ids=tokens, use_cache=False).last_hidden_state)
        assert torch.equal(logits_of("hf", formats.paths["hf"], tokens, torch.float32), expected)
        checkpoint = resolve_checkpoint(formats.paths["megatron"])
        config = saved_config(checkpoint)
        with parallel_context(config.parallel) as context:
            kernels = choose_kernels(config.kernels)
            decoder = build_decoder(
                config.model, config.parallel, kernels, context.groups, dtype=torch.float32, seed=None
            )
            load_checkpoint(checkpoint, [decoder], None, context)
            expected = decoder.eval()(tokens, None, None)
    assert torch.equal(logits_of("megatron", formats.paths["megatron"], tokens, torch.float32), expected)


def by_layer(damage):
    """Apply `damage` to the tensors of each layer, which it finds without their prefix."""

    def apply(state, settings, model):
        for i in range(model.num_layers):
            prefix = f"model.layers.{i}."
            layer = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
            damage(layer, model)
            state |= {prefix + name: w for name, w in layer.items()}

    apply.__name__ = damage.__name__
    return apply


def neighbours(rows, width):
    """Rows of heads whose halves rotate, put so that neighbours do: as if nobody had permuted them."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


@by_layer
def queries_not_permuted(layer, model):
    layer["self_attn.q_proj.weight"] = neighbours(layer["self_attn.q_proj.weight"], model.head_dim)


@by_layer
def norms_not_permuted(layer, model):
    for name in (name for name in layer if name[10:17] in ("q_norm.", "k_norm.")):
        layer[name] = neighbours(layer[name].flatten(), model.head_dim).view_as(layer[name])


@by_layer
def norms_averaged(layer, model):
    for name in (name for name in layer if name[10:17] in ("q_norm.", "k_norm.")):
        layer[name] = layer[name].mean(0, keepdim=True).expand_as(layer[name]).contiguous()


@by_layer
def gate_and_up_swapped(layer, model):
    gate, up = "mlp.gate_proj.weight", "mlp.up_proj.weight"
    layer[gate], layer[up] = layer[up], layer[gate]


@by_layer
def values_of_other_heads(layer, model):
    layer["self_attn.v_proj.weight"] = layer["self_attn.v_proj.weight"].roll(model.head_dim, 0)


def other_norm_order(state, settings, model):
    settings["swin_norm"] = not settings["swin_norm"]


def other_rotation(state, settings, model):
    settings["rope_parameters"]["rope_theta"] = settings["rope_theta"] = 1_000.0


def layers_swapped(state, settings, model):
    for name in [name for name in state if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0.", "layers.1.")
        state[name], state[other] = state[other], state[name]


def embedding_shifted(state, settings, model):
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0)


DAMAGES = {
    queries_not_permuted: "block 0",
    norms_not_permuted: "block 0",
    norms_averaged: "block 0",
    gate_and_up_swapped: "block 0",
    values_of_other_heads: "block 0",
    other_norm_order: "block 0",
    other_rotation: "block 0",
    layers_swapped: "block 0",
    embedding_shifted: "embedding",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_conversion_fails(formats, damage, tmp_path):
    if damage is norms_averaged and formats.model.qk_norm_groups == 1:
        pytest.skip("one group: nothing to average")
    damaged = rewritten(formats.paths["hf"], tmp_path / "damaged", damage, formats.model)
    found = formats.compare("meta", "hf", path=damaged)
    assert found.difference > 0.1 and not found.is_same
    begins = next(name for name, difference in found.by_part if difference > 1e-4)
    assert begins == DAMAGES[damage]


def rewritten(source, folder, damage, model):
    """A copy of a Hugging Face export with its tensors or its settings changed."""
    shutil.copytree(source, folder)
    state, settings = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(state, settings, model)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("permuted", [ROWS, NORMS, ()], ids=["rows only", "norms only", "nothing"])
def test_half_a_permutation_fails_on_our_side_too(formats, permuted, tmp_path):
    overrides = next(
        overrides for overrides in CASES.values() if load_config("debug", overrides).model == formats.model
    )
    weights = halves_apart(formats.weights, *permuted) if permuted else formats.weights
    found = formats.compare("meta", "megatron", path=save_filled(overrides, weights, tmp_path / "damaged"))
    assert found.difference > 0.1 and not found.is_same


def test_a_rounded_copy_compares_when_both_are_rounded(formats, tmp_path):
    rounded = convert_checkpoint(("megatron", "hf"), formats.paths["megatron"], tmp_path / "bf16", dtype="bf16")
    assert formats.compare("meta", "hf", torch.bfloat16, path=rounded).difference < 1e-5
    assert not formats.compare("meta", "hf", path=rounded).is_same


def test_values_that_are_not_numbers_are_not_the_same(formats, tmp_path):
    def damage(state, settings, model):
        state["model.norm.weight"][0] = torch.nan

    damaged = rewritten(formats.paths["hf"], tmp_path / "damaged", damage, formats.model)
    assert not formats.compare("meta", "hf", path=damaged).is_same


def test_one_side_may_have_more_rows(formats, tmp_path):
    """Rows that only pad the vocabulary are not compared; those that both have are."""

    def pad(state, settings, model):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat((state[name], torch.full((64, model.hidden_size), 9.0)))
        settings["vocab_size"] = 192

    padded = rewritten(formats.paths["hf"], tmp_path / "padded", pad, formats.model)
    assert formats.compare("meta", "hf", path=padded).difference < 1e-5


def test_models_of_other_sizes_are_refused(formats, tmp_path):
    def shorten(state, settings, model):
        settings["num_hidden_layers"] = 1

    short = rewritten(formats.paths["hf"], tmp_path / "short", shorten, formats.model)
    with pytest.raises(ValueError, match=rf"^{short}: has other sizes than {formats.paths['meta']}; it was not conv"):
        formats.compare("meta", "hf", path=Path(short))


def test_a_folder_that_lacks_a_tensor_is_refused(formats, tmp_path):
    def lose(state, settings, model):
        del state["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(ValueError, match=r"has no config\.json"):
        logits_of("hf", tmp_path, some_tokens(128), torch.float32)
    damaged = rewritten(formats.paths["hf"], tmp_path / "damaged", lose, formats.model)
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight; it is not the model"):
        formats.compare("meta", "hf", path=damaged)


def test_luminas_variant_is_computed_by_transformers(formats, tmp_path):
    """One row for each group of heads, which is that of every head in it."""

    @by_layer
    def group(layer, model):
        for name in (name for name in layer if name[10:17] in ("q_norm.", "k_norm.")):
            layer[name] = layer[name].unflatten(0, (model.qk_norm_groups, -1))[:, 0]

    grouped = rewritten(formats.paths["hf"], tmp_path / "groups", group, formats.model)
    assert formats.compare("meta", "hf", path=grouped).difference < 1e-5
