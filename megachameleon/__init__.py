"""Large-scale distributed training of early-fusion mixed-modal models on megatron-core."""

__version__ = "0.1.0"
