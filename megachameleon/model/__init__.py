"""The decoder: Chameleon's norms, attention, blocks and loss as megatron-core modules."""
