"""megatron-core as it comes: its local spec, its attention, its vocabulary-parallel cross entropy, its optimizer.

It is not the same function: its QK-norm is an RMSNorm without bias, and it has no z-loss. With `--peer-z-loss` it gets
one, computed beside its cross entropy. Attention gets no mask, so that megatron-core makes its causal one itself.
torch's AdamW is switched to its fused kernel, which megatron-core 0.16 leaves off.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import __version__
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.batches import POOL, PeerBatch, peer_batches
from benchmarks.contestants.base import BETAS, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Z_LOSS, Settings
from benchmarks.contestants.gpt_weights import load_gpt
from benchmarks.same_weights import Weights
from megachameleon.parallel.device import optimizer_scope


class GPTModelWithZLoss(GPTModel):
    """Returns log Z beside the cross entropy, fp32 [b, s, 2]."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The copy is needed: megatron-core's cross entropy overwrites fp32 logits."""
        log_z = logits.to(torch.float32, copy=True).logsumexp(-1).transpose(0, 1)
        return torch.stack((super().compute_language_model_loss(labels, logits), log_z), dim=-1)


class Megatron:
    """See the module."""

    same_function = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        device = settings.context.device
        model_parallel_cuda_manual_seed(0)  # its attention asks for a random state even without dropout
        config = _transformer_config(settings)
        self.model = _model(settings, config).to(device)
        inner = Float16Module(config, self.model) if config.bf16 else self.model
        self.replica = DistributedDataParallel(
            config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False), inner
        )
        config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = _optimizer(self.replica, config)
        self.batches = peer_batches(settings.samples, device, isolate=settings.documents > 1)

    @property
    def title(self) -> str:
        """For the table."""
        precision = "fp32" if self.settings.precision == "fp32" else "bf16, fp32 masters and gradients"
        z_loss = "z-loss beside" if self.settings.peer_z_loss else "no z-loss"
        return f"megatron-core {__version__} local spec, {precision}, {z_loss}"

    def load(self, weights: Weights) -> None:
        """See `Contestant.load`. QK-norms have no biases here."""
        load_gpt(self.model, weights, qk_bias=False)
        with optimizer_scope():
            self.optimizer.reload_model_params()

    def step(self, number: int) -> float:
        """See `Contestant.step`."""
        self.replica.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter([self.batches[number % POOL]]),
            model=[self.replica],
            num_microbatches=1,
            seq_length=self.settings.shape.sequence_length,
            micro_batch_size=self.settings.shape.micro_batch_size,
            forward_only=False,
        )
        with optimizer_scope():
            self.optimizer.step()
        return float(outputs[0]["nll"])

    def _forward_step(self, batches: Iterator[PeerBatch], model: Any) -> tuple[Tensor, Callable]:
        batch = next(batches)
        positions = torch.arange(batch.tokens.size(1), device=batch.tokens.device).expand_as(batch.tokens)
        hidden = None if batch.visible is None else ~batch.visible
        output = model(batch.tokens, positions, hidden, labels=batch.labels)

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nll, log_z = output.float().unbind(-1) if self.settings.peer_z_loss else (output.float(), None)
            count = batch.loss_mask.sum()
            mean = (nll * batch.loss_mask).sum() / count
            extra = 0.0 if log_z is None else Z_LOSS * (log_z.square() * batch.loss_mask).sum() / count
            return mean + extra, {"nll": mean.detach()}

        return output, loss


def build(settings: Settings, *, variant: str) -> Megatron:
    """The contestant."""
    return Megatron(settings)


def _model(settings: Settings, config: TransformerConfig) -> GPTModel:
    kind = GPTModelWithZLoss if settings.peer_z_loss else GPTModel
    return kind(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=settings.shape.vocab,
        max_sequence_length=settings.shape.sequence_length,
        position_embedding_type="rope",
        rotary_base=settings.shape.rope_theta,
        share_embeddings_and_output_weights=False,
        pg_collection=settings.context.groups,
    )


def _transformer_config(settings: Settings) -> TransformerConfig:
    """Fusions that torch.compile makes are on where there is a GPU, as Megatron-LM's scripts have them."""
    shape, on_gpu = settings.shape, settings.context.device.type == "cuda"
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,  # needs apex
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _optimizer(replica: Any, config: TransformerConfig) -> Any:
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPSILON,
        clip_grad=CLIP,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
    )
    with optimizer_scope():
        optimizer = get_megatron_optimizer(megatron_config, [replica])
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    config.grad_scale_func = optimizer.scale_loss
    return optimizer
