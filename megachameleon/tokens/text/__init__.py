"""Text to ids of the mixed-modal vocabulary and back: one tokenizer over two engines; training, import, export."""

from megachameleon.tokens.text.tokenizer import TextTokenizer, require_no_tokenizer, text_tokenizer_file

__all__ = ["TextTokenizer", "require_no_tokenizer", "text_tokenizer_file"]
