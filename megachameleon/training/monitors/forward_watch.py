"""Which tokens this process has before it in the forward pass of a step that is measured.

Monitors hook into the modules of the built model. A module also runs when a validation or a drawing calls it, and
again when recomputation does; only what happens inside a chunk's own forward pass of a training step is to be counted.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megachameleon.checkpoint.state import unwrap
from megachameleon.model.head import Targets
from megachameleon.model.sequence_layout import context_chunks, natural_positions
from megachameleon.parallel.context import ParallelContext
from megachameleon.training.monitors.base import Monitor

if TYPE_CHECKING:
    from megachameleon.training.step import TrainingState

TEXT, IMAGE = 0, 1


class ForwardWatch(Monitor):
    """Follows the micro-batches of this process's chunks through a step. Stands before the monitors that ask it.

    Tensor-parallel ranks see the same tokens, or under sequence parallelism a part each. Either way each answers for
    one equal part of them, so that sums over the world count every token once.
    """

    def __init__(self, chunks: Sequence[nn.Module], context: ParallelContext) -> None:
        self.decoders = [unwrap(chunk) for chunk in chunks]
        self.context = context
        self.num_tokens = torch.zeros((), dtype=torch.float64, device=context.device)
        """float64 []: tokens with loss in this step so far, those of this process's last chunk if it holds the head."""
        self.document_ids: Tensor | None = None
        """int [b, t] of whole sequences, -1 for padding; None where a sample is one continuous stream."""
        self._measuring = False
        self._targets: Targets | None = None
        self._modality: Tensor | None = None
        for decoder in self.decoders:
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
            # Also after an error, or it would take what comes next for a part of this pass.
            decoder.register_forward_hook(self._leave, always_call=True)

    def begin(self, step: int) -> None:
        """Forward passes count from here."""
        self._measuring = True
        self.num_tokens.zero_()

    def after_backward(self, state: "TrainingState") -> None:
        """Forward passes do not count any more."""
        self._measuring = False

    @property
    def inside(self) -> bool:
        """Whether a chunk's forward pass is under way that is to be measured."""
        return self._targets is not None

    def positions(self, rank: int, length: int) -> Tensor:
        """int64 [length]: where in the sequence a context-parallel rank's part of it stands."""
        size = self.context.config.context_parallel
        return natural_positions(context_chunks(length * size, rank, size), self.context.device)[0]

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """This process's blocks, with their place in the whole model, from 0."""
        for decoder in self.decoders:
            for layer in decoder.decoder.layers:
                yield layer.layer_number - 1, layer

    def own_labels(self) -> Tensor:
        """int64 [tokens of this process]: what is to be predicted at each."""
        assert self._targets is not None
        return self._own_part(self._targets.by_token()[0])

    def own_modality(self) -> Tensor:
        """float64 [2, tokens of this process]: 1 where a token carries loss and its label is of text, or of a picture.

        Padding and the last tokens of documents have 0 twice: these are the tokens of `loss_text` and `loss_image`.
        """
        assert self._targets is not None
        if self._modality is None:
            _, weights, is_image = self._targets.by_token()
            counted = weights > 0
            self._modality = self._own_part(torch.stack((counted & ~is_image, counted & is_image)).double())
        return self._modality

    def own_rows(self, hidden: Tensor) -> Tensor:
        """Hidden states [s (/ tensor_parallel), b, h] to those of this process's tokens, [tokens, h]."""
        rows = hidden.detach().flatten(0, 1)
        return rows if self.context.config.sequence_parallel else self._own_part(rows.t()).t()

    def _own_part(self, by_token: Tensor) -> Tensor:
        """[..., s * b] to the part that this tensor-parallel rank answers for."""
        # Not chunk, which may make fewer parts than there are ranks.
        return by_token.tensor_split(self.context.config.tensor_parallel, -1)[self.context.tensor_rank]

    def _enter(self, decoder: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._targets = named.get("targets") if self._measuring else None
        self._modality = None
        if self.inside:
            self.document_ids = arguments[2]  # as in Decoder.forward
            if decoder.post_process:
                self.num_tokens += self.own_modality().sum()

    def _leave(self, decoder: nn.Module, arguments: Any, output: Any) -> None:
        self._targets = self.document_ids = self._modality = None
