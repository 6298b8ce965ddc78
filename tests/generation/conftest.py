import pytest
import torch

from megachameleon.generation.stepper import PADDING_DOCUMENT
from megachameleon.tokens.vocabulary import Vocabulary


class FakeStepper:
    """Logits are a fixed function of all ids of a context and their order; counts its calls."""

    def __init__(self, vocabulary: Vocabulary, context_length: int = 64) -> None:
        self.context_length = context_length
        self.table = torch.randn(vocabulary.size, vocabulary.size, generator=torch.Generator().manual_seed(0))
        self.table[:, vocabulary.begin_image] += 0.5
        self.table[:, vocabulary.eos] -= 0.5
        self.contexts: list[list[int]] = []
        self.prefilled: list[list[list[int]]] = []
        self.decodes = 0

    def prefill(self, tokens, document_ids, room):
        self.contexts = [row[ids != PADDING_DOCUMENT].tolist() for row, ids in zip(tokens, document_ids, strict=True)]
        self.prefilled.append([list(context) for context in self.contexts])
        self.room = room
        return self.logits()

    def decode(self, tokens):
        self.decodes += 1
        self.room -= 1
        assert self.room >= 0
        for context, token in zip(self.contexts, tokens.tolist(), strict=True):
            context.append(token)
        return self.logits()

    def logits(self):
        return torch.stack([self.logits_of(context) for context in self.contexts])

    def logits_of(self, context):
        weights = 0.7 ** torch.arange(len(context) - 1, -1, -1)
        return 3 * (self.table[context] * weights[:, None]).sum(0)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary.compact(num_text_ids=20, num_image_codes=8, image_grid=(2, 3))


@pytest.fixture
def stepper(vocabulary) -> FakeStepper:
    return FakeStepper(vocabulary)
