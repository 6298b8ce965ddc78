"""Text-only models of Llama's layout, as the start of a mixed-modal one."""
