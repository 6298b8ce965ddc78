"""What a converter with a known fault would compute: far from right, so the comparisons of formats can fail.

Each fault is put into Meta's files where the converter will turn it into its own: the logits of the converted
checkpoint are then those of a converter that has the fault.
"""

import json

import pytest
import torch
from converting import VOCABULARY, convert_checkpoint
from huggingface_writer import neighbours
from meta_oracle import NORMS, ROWS, halves_apart
from meta_writer import write_meta
from three_formats import SHAPES, Case, logits

pytest.importorskip("transformers", reason="an oracle of the tests only")

FAULTY = 0.1


def on(ends, change):
    """Change the weights whose names end so."""
    return lambda weights: {name: change(w) if name.endswith(ends) else w for name, w in weights.items()}


def not_permuted(*ends):
    """So that the converter's permutation gives the order back in which Meta's files have them."""
    return lambda weights: (
        weights
        | {name: neighbours(w) for name, w in weights.items() if name.endswith(ends) and not name.endswith("ffn_norm")}
    )


def swapped(one, other):
    return lambda weights: {
        name.replace(one, "|").replace(other, one).replace("|", other): weight for name, weight in weights.items()
    }


FAULTS = {
    "rows of queries and keys not permuted": not_permuted(*ROWS),
    "rows of queries alone not permuted": not_permuted(".q"),
    "QK-norms not permuted": not_permuted(*NORMS),
    "nothing permuted": not_permuted(*ROWS, *NORMS),
    "permuted twice": lambda weights: halves_apart(weights, *ROWS, *NORMS),
    "QK-norms averaged": on(NORMS, lambda w: w.mean(0, keepdim=True).expand_as(w)),
    "shards' QK-norms in another order": on(NORMS, lambda w: w.flip(0)),
    "heads of queries in another order": on(".q", lambda w: w.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)),
    "gate and up swapped": swapped(".gate", ".up"),
    "norms of a layer swapped": swapped(".attention_norm", ".ffn_norm"),
    "QK-norms of queries and keys swapped": swapped(".q_norm", ".k_norm"),
    "halves of the hidden axis swapped": on(("embedding",), lambda w: w.roll(w.size(1) // 2, 1)),
}
OF_GROUPS = ("QK-norms averaged", "shards' QK-norms in another order")


@pytest.mark.parametrize("fault", [*FAULTS, "the other order of norms"])
@pytest.mark.parametrize(("shape", "target"), [("7B", "hf"), ("34B", "megatron")])
def test_a_fault_shows(shape, fault, target, tmp_path):
    case = Case(SHAPES[shape])
    if fault in OF_GROUPS and case.model.qk_norm_groups == 1:
        pytest.skip("one group is its own average")
    weights = FAULTS.get(fault, dict)(case.weights)
    meta = write_meta(tmp_path / "meta", case.model, weights, shards=case.model.qk_norm_groups, vocabulary=VOCABULARY)
    if fault not in FAULTS:
        params = json.loads((meta / "params.json").read_text())
        params["model"]["swin_norm"] ^= True
        (meta / "params.json").write_text(json.dumps(params))
        (meta / "checklist.chk").unlink()
    converted = convert_checkpoint(("meta", target), meta, tmp_path / "converted")
    found = logits(target, converted, case)
    assert torch.isfinite(found).all()
    assert (found - case.logits).abs().max() > FAULTY
