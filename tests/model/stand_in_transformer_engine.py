"""Transformer Engine without Transformer Engine: enough of it to build and run a decoder on the CPU.

Signatures are copied from version 2.11, so that a call which the real one would refuse fails here too; the arithmetic
is plain torch. Everything else of the package is a mock. Run as a script, it compares the decoder of the
`transformer_engine` backend with that of `torch` and prints what it found as JSON. It must be a process of its own:
megatron-core decides at import whether Transformer Engine is there.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

CALLS = []


class Linear(torch.nn.Module):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
        parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False,
        symmetric_ar_type=None, save_original_input=False, rng_tracker_name=None, name=None,
    ):  # fmt: skip
        super().__init__()
        assert not bias and tp_size == 1
        if ub_name is not None:
            CALLS.append(("userbuffers", ub_name, ub_overlap_ag, ub_overlap_rs))
        self.fuse_wgrad_accumulation, self.save_original_input = fuse_wgrad_accumulation, save_original_input
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        CALLS.append(("linear", self.fuse_wgrad_accumulation))
        return F.linear(inp, self.weight)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("there is no extra state in our checkpoints")


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, softmax_scale=None):
        super().__init__()
        self.repeat, self.scale = num_attention_heads // num_gqa_groups, softmax_scale

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
        cu_seqlens_kv=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
    ):  # fmt: skip
        CALLS.append(("attention", qkv_format))
        qkv = (query_layer, key_layer, value_layer)
        if qkv_format == "sbhd":
            assert attn_mask_type == "causal"
            return self._attend(*(x.permute(1, 2, 0, 3) for x in qkv)).permute(2, 0, 1, 3).flatten(2)
        assert qkv_format == "thd" and attn_mask_type == "padding_causal"
        assert cu_seqlens_q.dtype == torch.int32 and int(cu_seqlens_q[-1]) == len(query_layer)
        parts = [
            self._attend(*(x[start:stop].transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
            for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_kv[1:].tolist(), strict=True)
        ]
        assert max(map(len, parts)) <= max_seqlen_q
        return torch.cat(parts).flatten(1)

    def _attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.repeat > 1)


def rmsnorm_fwd(x, weight, eps, out, quantizer, otype, sm_margin, zero_centered_gamma):
    CALLS.append(("norm", "rms"))
    assert x.dim() == 2 and x.is_contiguous() and otype == str(x.dtype)
    scale = x.square().mean(-1).add(eps).rsqrt()
    return x * scale[:, None] * weight, None, scale


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    normed = x * rsigma[:, None]
    g = dz * gamma
    return (g - normed * (g * normed).mean(-1, keepdim=True)) * rsigma[:, None], (dz * normed).sum(0)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, otype, sm_margin, zero_centered_gamma):
    CALLS.append(("norm", "layer"))
    assert x.dim() == 2 and x.is_contiguous() and otype == str(x.dtype)
    y, mean, scale = torch.native_layer_norm(x, (x.size(-1),), weight, bias, eps)
    return y, mean.flatten(), scale.flatten()


def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    return torch.ops.aten.native_layer_norm_backward(
        dz, x, (x.size(-1),), mu[:, None], rsigma[:, None], gamma, gamma, (True, True, True)
    )


class SplitAlongDim:
    @staticmethod
    def apply(x, dim, sizes):
        return x.split(sizes, dim)


class DelayedScaling:
    def __init__(self, margin, fp8_format, amax_history_len, amax_compute_algo, **others):
        self.what = ("delayed", fp8_format, amax_history_len, amax_compute_algo)


class Float8CurrentScaling:
    def __init__(self, fp8_format, fp8_dpa):
        self.what = ("tensorwise", fp8_format)


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    CALLS.append(("fp8", *fp8_recipe.what))
    yield


def initialize_ub(
    shape, tp_size, use_fp8=False, quantization_modes=None, dtype=torch.bfloat16, ub_cfgs=None, bootstrap_backend=None
):
    CALLS.append(("userbuffers", shape, tp_size, quantization_modes, bootstrap_backend))


class _Types(dict):
    def __missing__(self, dtype):
        return str(dtype)


REAL = {
    "transformer_engine.pytorch": {
        "Linear": Linear,
        "DotProductAttention": DotProductAttention,
        "fp8_autocast": fp8_autocast,
        "initialize_ub": initialize_ub,
        "UserBufferQuantizationMode": SimpleNamespace(FP8="fp8", NONE="none"),
    },
    "transformer_engine.common.recipe": {
        "DelayedScaling": DelayedScaling,
        "Float8CurrentScaling": Float8CurrentScaling,
        "Format": SimpleNamespace(HYBRID="hybrid", E4M3="e4m3"),
    },
    "transformer_engine.pytorch.cpu_offload": {"get_cpu_offload_context": lambda *_, **__: (nullcontext(), None)},
    "transformer_engine.pytorch.attention": {"_SplitAlongDim": SplitAlongDim},
    "transformer_engine.pytorch.constants": {"TE_DType": _Types()},
    "transformer_engine_torch": {
        function.__name__: function for function in (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd)
    },
}
CLASSES = (
    "LayerNormLinear", "GroupedLinear", "CudaRNGStatesTracker", "FusedAdam", "QuantizedTensor",
    "Float8Tensor", "MXFP8Tensor", "NVFP4Tensor", "QuantizedTensorStorage",
)  # fmt: skip
"""What megatron-core inherits from or asks with isinstance."""


class _Package(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if any(f"{module}.".startswith(f"{self.__name__}.{name}.") for module in REAL):
            return importlib.import_module(f"{self.__name__}.{name}")
        value = REAL.get(self.__name__, {}).get(name)
        if value is None:
            value = type(name, (torch.nn.Module,), {}) if name in CLASSES else MagicMock()
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of the package."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Package(spec.name)
        module.__version__ = "2.11.0"
        return module

    def exec_module(self, module):
        pass


def build(context, config, **kernels):
    """A decoder and the keys of its checkpoint."""
    from megachameleon.config import KernelsConfig
    from megachameleon.model.decoder import build_decoder
    from megachameleon.model.kernels.table import choose_kernels

    chosen = choose_kernels(KernelsConfig(**kernels), "cuda")
    model = build_decoder(config.model, config.parallel, chosen, context.groups, dtype=torch.float32, seed=1)
    state = model.sharded_state_dict(metadata={"dp_cp_group": context.groups.dp_cp})
    assert all(item.data is None for item in state.values() if type(item).__name__ == "ShardedObject")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)) * len(name) / 40)
    return model, {name: type(item).__name__ for name, item in state.items()}


def compare(context, config, documents):
    """Largest differences of logits and gradients between the two backends, and whether their checkpoints agree."""
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    all_te = dict.fromkeys(("norm", "qk_norm", "attention", "linear"), "transformer_engine")
    results, keys = [], []
    for choice in (all_te, {}):
        model, names = build(context, config, **choice)
        logits = model(tokens, None, documents)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for _, parameter in sorted(model.named_parameters()))])
        keys.append(names)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    return {"error": max(errors), "same_keys": keys[0] == keys[1]}


def train(context, config):
    """One backward pass with a `main_grad` to add to."""
    from megachameleon.parallel.replicas import wrap_replicas

    model, _ = build(context, config, linear="transformer_engine")
    (replica,) = wrap_replicas([model], config.parallel)
    replica.zero_grad_buffer()
    CALLS.clear()
    replica(torch.randint(0, 128, (2, 32)), None, None)
    return {"calls": sorted({str(call) for call in CALLS})}


def calls_of(context, config, **kernels):
    """What building and running a decoder asks of the package, except for its operations."""
    from megachameleon.model.kernels.table import start_kernels

    CALLS.clear()
    model, _ = build(context, config, linear="transformer_engine", **kernels)
    start_kernels(model.kernels, num_tokens=64, hidden_size=32, tensor_parallel=2)
    model(torch.randint(0, 128, (2, 32)), None, None)
    return {"calls": sorted({str(call) for call in CALLS if call[0] != "linear"})}


def main():
    sys.meta_path.insert(0, Finder())
    torch.cuda.get_device_capability = lambda: (9, 0)
    from megachameleon.config import ParallelConfig, load_config
    from megachameleon.parallel.context import parallel_context

    found = {}
    documents = torch.tensor([[0] * 10 + [1] * 22, [0] * 20 + [-1] * 12], dtype=torch.int32)
    with parallel_context(ParallelConfig()) as context:
        for name, overrides, ids in (
            ("documents", [], documents),
            ("stream", ["model.norm_order=swin"], None),
            ("groups", ["model.qk_norm_groups=2"], documents),
            ("rms", ["model.qk_norm=rmsnorm"], None),
        ):
            CALLS.clear()
            found[name] = compare(context, load_config("debug", overrides), ids)
            found[name]["calls"] = sorted({str(call) for call in CALLS})
        for fp8 in ("te_delayed", "te_tensorwise"):
            found[fp8] = calls_of(context, load_config("debug", []), fp8=fp8)
        found["userbuffers"] = calls_of(context, load_config("debug", []), userbuffers=True)
        found["training"] = train(context, load_config("debug", []))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
