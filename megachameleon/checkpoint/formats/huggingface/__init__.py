"""Hugging Face's formats: Chameleon as transformers and others have it."""
