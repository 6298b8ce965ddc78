"""Batched generation of text and pictures.

Rows are padded on the left and share the columns of one static context. Each row has its own modality state, its own
draws, and, while it is in a picture, its own guiding streams. The context is read anew when a row begins a picture that
is guided; otherwise every step reads one id per stream.
"""

from collections.abc import Callable, Sequence

import torch

from megachameleon.generation.guidance import Streams, build_streams
from megachameleon.generation.modality import UNDECIDED, ModalityMachine, open_picture_start, text_mask
from megachameleon.generation.sampling import choose, penalize_repetition, row_draws
from megachameleon.generation.settings import GenerationSettings
from megachameleon.generation.stepper import PADDING_DOCUMENT, Stepper
from megachameleon.tokens.vocabulary import Vocabulary


def generate(
    stepper: Stepper,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    rows: Sequence[int] | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        prompts: ids of each row, beginning with bos. A prompt that ends inside a picture, be it with the begin-image
            id, goes on as a picture.
        rows: the number of each prompt, which picks its draws; 0, 1, … when left out. A row's draws do not depend on
            the rows beside it, so any subset of the prompts can be done elsewhere.
        on_finished: called with the number of rows that have just ended, for progress bars.

    Returns:
        the new ids of each row, without the prompt; the end-of-document id is included where the model emitted it.

    Raises:
        ValueError: a prompt that is empty, malformed, or too long for the context.
    """
    numbers = list(range(len(prompts))) if rows is None else list(rows)
    limits = [_limit(ids, row, stepper.context_length, settings, vocabulary) for row, ids in enumerate(prompts)]
    results: list[list[int]] = [[] for _ in prompts]
    # prompts of like length together: every row is padded to the longest of its batch
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        batch = _Batch(
            stepper,
            vocabulary,
            [prompts[row] for row in chosen],
            [limits[row] for row in chosen],
            [numbers[row] for row in chosen],
            settings,
        )
        for row, ids in zip(chosen, batch.run(on_finished), strict=True):
            results[row] = ids
    return results


def _limit(
    ids: Sequence[int], row: int, context_length: int, settings: GenerationSettings, vocabulary: Vocabulary
) -> int:
    """The length at which a row ends; refuses prompts that leave no room."""
    if len(ids) >= context_length:
        raise ValueError(
            f"prompt {row} has {len(ids)} ids and the model's context holds {context_length}; shorten the prompt"
        )
    room = context_length - len(ids)
    room = room if settings.max_new_tokens is None else min(room, settings.max_new_tokens)
    wants_picture = settings.modality == "image" and open_picture_start(ids, vocabulary) is None
    if wants_picture and room < vocabulary.image_length:
        raise ValueError(
            f"prompt {row} leaves room for {room} ids but a picture has {vocabulary.image_length}; "
            f"{'shorten the prompt' if room == context_length - len(ids) else 'raise max_new_tokens'}"
        )
    return len(ids) + room


class _Batch:
    """One batch on its way: contexts, states, and what the stepper has read so far."""

    def __init__(
        self,
        stepper: Stepper,
        vocabulary: Vocabulary,
        prompts: list[Sequence[int]],
        limits: list[int],
        numbers: list[int],
        settings: GenerationSettings,
    ) -> None:
        self.stepper, self.vocabulary, self.settings = stepper, vocabulary, settings
        self.prompt_lengths = [len(ids) for ids in prompts]
        self.contexts = [list(ids) for ids in prompts]
        self.machine = ModalityMachine(
            vocabulary, prompts, modality=settings.modality, limits=limits, max_pictures=settings.picture_limit
        )
        # drawn all at once, so a row's draws depend on its number and step alone
        steps = max(limit - length for limit, length in zip(limits, self.prompt_lengths, strict=True))
        self.draws = row_draws(settings.seed, numbers, steps)
        self.text_mask = text_mask(vocabulary)
        self.streams: Streams | None = None
        self.unread = 0

    def run(self, on_finished: Callable[[int], None] | None) -> list[list[int]]:
        """Step until every row has ended; the new ids of each row."""
        step, reported = 0, 0
        while not bool(self.machine.finished.all()):
            ids = self.machine.forced()
            # a forced id needs no forward pass; it is read together with the next
            if bool((ids == UNDECIDED).any()):
                ids = self._decide(ids, self._logits(), self.draws[:, step])
            live = (~self.machine.finished).nonzero().flatten().tolist()
            self.machine.advance(ids)
            for row in live:
                self.contexts[row].append(int(ids[row]))
            step, self.unread = step + 1, self.unread + 1
            if on_finished is not None and (ended := int(self.machine.finished.sum())) > reported:
                on_finished(ended - reported)
                reported = ended
        return [context[length:] for context, length in zip(self.contexts, self.prompt_lengths, strict=True)]

    def _logits(self) -> torch.Tensor:
        """Guided logits float32 [rows, ids] after all that the contexts hold."""
        machine, streams = self.machine, self.streams
        # decode takes one id a stream; after forced ids there are more to read
        if streams is None or self.unread != 1 or self._streams_are_stale(streams):
            logits = self._prefill()
        else:
            last = torch.tensor([self.contexts[owner][-1] for owner in streams.owners])
            logits = self.stepper.decode(last)
        self.unread = 0
        assert self.streams is not None
        return self.streams.combine(logits, machine.in_picture)[:, : self.vocabulary.size]

    def _streams_are_stale(self, streams: Streams) -> bool:
        """Whether a row has just begun a picture that wants guidance, or the last guided one has ended."""
        in_picture = self.machine.in_picture
        guides = self.settings.guidance != 1.0 or self.settings.image_guidance != 1.0
        # guiding streams have other contexts, which no cache holds yet
        begun = bool((in_picture & (self.machine.codes == 0)).any())
        return (guides and begun) or (bool(streams.guided) and not bool(in_picture.any()))

    def _prefill(self) -> torch.Tensor:
        """Read all contexts of unfinished rows, float32 [streams, ids]."""
        machine = self.machine
        live = (~machine.finished).nonzero().flatten().tolist()
        self.streams = build_streams(self.contexts, live, machine.in_picture.tolist(), self.settings, self.vocabulary)
        # padded on the left, so that all streams write the same column next
        width = max(len(context) for context in self.streams.contexts)
        tokens = torch.full((len(self.streams.contexts), width), self.vocabulary.pad)
        document_ids = torch.full(tokens.shape, PADDING_DOCUMENT, dtype=torch.int32)
        for stream, context in enumerate(self.streams.contexts):
            tokens[stream, width - len(context) :] = torch.tensor(context)
            document_ids[stream, width - len(context) :] = 0
        # of unfinished rows only: the cache is allocated for it
        room = int((machine.limits - machine.lengths)[~machine.finished].max())
        return self.stepper.prefill(tokens, document_ids, room)

    def _decide(self, ids: torch.Tensor, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Fill in the undecided ids, int64 [rows]."""
        vocabulary, open_ids = self.vocabulary, ids == UNDECIDED
        in_picture = self.machine.in_picture
        drawing = (open_ids & in_picture).nonzero().flatten()
        if len(drawing):
            codes = logits[drawing, vocabulary.image_code_start : vocabulary.image_code_end]
            chosen = choose(codes, draws[drawing], self.settings.image)
            ids[drawing] = chosen.cpu() + vocabulary.image_code_start
        writing = (open_ids & ~in_picture).nonzero().flatten()
        if len(writing):
            ids[writing] = choose(self._text_logits(logits, writing), draws[writing], self.settings.text).cpu()
        return ids

    def _text_logits(self, logits: torch.Tensor, writing: torch.Tensor) -> torch.Tensor:
        """Logits of the rows `writing`, with -inf where TEXT forbids the id and repetition penalised."""
        vocabulary, penalty = self.vocabulary, self.settings.text.repetition_penalty
        allowed = self.text_mask.repeat(len(writing), 1)
        # forbidden where a whole picture no longer fits, as in the release
        allowed[:, vocabulary.begin_image] = self.machine.may_begin[writing]
        chosen = logits[writing.to(logits.device)]
        if penalty != 1.0:
            seen = torch.zeros_like(allowed)
            for index, row in enumerate(writing.tolist()):
                seen[index, self.contexts[row]] = True
            # unlike the release, which also penalises control ids, codes and padding of the context
            seen[:, : vocabulary.text_start] = False
            chosen = penalize_repetition(chosen, seen.to(chosen.device), penalty)
        return chosen.masked_fill(~allowed.to(chosen.device), float("-inf"))
