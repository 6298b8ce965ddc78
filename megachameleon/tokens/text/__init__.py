"""Text to ids of the mixed-modal vocabulary and back: one tokenizer over two engines; training, import, export."""

from megachameleon.tokens.text.tokenizer import TextTokenizer, text_tokenizer_file

__all__ = ["TextTokenizer", "text_tokenizer_file"]
