"""The image tokenizer: pictures to codes of a learned codebook (vector quantisation) and back."""

from megachameleon.tokens.vq.tokenizer import ImageTokenizer

__all__ = ["ImageTokenizer"]
