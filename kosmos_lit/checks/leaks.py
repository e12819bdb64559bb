"""Whether documents of a row see what they must not: tried on the run's own model, kernel, device and precision.

A mask that is built wrongly, or a kernel that takes it wrongly, shows in no loss curve: training works, a little too well.
So before the first step a made micro-batch goes through the model, then again with one document's words and images
changed, for each document in turn. Nothing may move in any other document; with `document_attention: row`, in no other row
and in no earlier document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import computed_in
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, IGNORE, LEADING, PAD, SpecialTokens

N_ROWS = 2
PARTS = (5, 3, 4)
"""Of a row's positions, what its three documents get; the rest, about an eighth, is padding."""
ASKED = 16
"""Positions of a document whose losses are compared, evenly spaced, the first and the last among them."""
NOISE = 4.0
"""A document has moved if its losses differ by more than this many times what two equal passes differ by, mostly nothing."""


@dataclass(frozen=True)
class Place:
    """A document of the made micro-batch."""

    row: int
    number: int
    at: slice
    """Its positions in the stream."""
    images: slice
    """Its images among the batch's."""
    losses: slice
    """Its losses among the batch's."""

    def __str__(self) -> str:
        return f"document {self.number} of row {self.row}"

    def may_see(self, other: Place, within: str) -> bool:
        """Return whether it may attend to another document."""
        return within == "row" and self.row == other.row and self.number > other.number


def check_leaks(trainer: L.Trainer, model: Kosmos, row_len: int, special: SpecialTokens) -> None:
    """Make sure that documents do not see each other in a run; all ranks take part, and agree.

    Raises: UserError saying which document sees which.
    """
    with trainer.precision_plugin.forward_context():
        leak = find_leak(model, row_len, special)
    if not trainer.strategy.reduce_boolean_decision(leak is None, all=True):
        kernel, device = model.config.decoder.attention_kernel, trainer.strategy.root_device
        dtype = computed_in(trainer.precision)
        raise UserError(
            f"attention leaks: {leak or 'found by another rank'} (decoder.attention_kernel: {kernel}, {dtype}, {device}): "
            "what is trained on it is worthless; set the kernel to sdpa, and report this"
        )


def find_leak(model: Kosmos, row_len: int, special: SpecialTokens) -> str | None:
    """Return what a document sees that it must not, as a sentence, or None if each sees what it should and no more.

    The model runs in evaluation mode, without gradient, and in the precision around the call.

    Raises: UserError if a kernel does not take these tensors, or the losses are not finite.
    """
    batch, places = made_batch(model.config, row_len, special, model.decoder.embed_tokens.weight.device)
    with torch.no_grad(), evaluating(model):
        try:
            first, again = model.nll(batch), model.nll(batch)
        except NotImplementedError as error:
            kernel = model.config.decoder.attention_kernel
            raise UserError(f"decoder.attention_kernel: {kernel} does not run here ({error}); set it to sdpa") from error
        if not first.isfinite().all():
            raise UserError("the model's losses are not finite before the first step; weights or precision are wrong")
        noise = NOISE * float((first - again).abs().max())
        for changed in places:
            for what, other in changes(batch, changed, special):
                moved = (model.nll(other) - first).abs().nan_to_num(nan=float("inf"))
                if what == "words" and not float(moved[changed.losses].max()) > noise:
                    return f"nothing moves in {changed} when its own words change"
                for place in places:
                    by = float(moved[place.losses].max())
                    allowed = place == changed or place.may_see(changed, model.config.decoder.document_attention)
                    if by > noise and not allowed:
                        return f"the losses of {place} move by up to {by:.2g} nats when {what} of {changed} change"
    return None


def made_batch(
    config: KosmosConfig, row_len: int, special: SpecialTokens, device: torch.device
) -> tuple[KosmosBatch, list[Place]]:
    """Return rows of three documents and padding, some positions of each supervised, and where they are.

    A document starts with an image where it is long enough for one.
    """
    draw, size, L = torch.Generator().manual_seed(0), config.vision.image_size, config.connector.n_latents
    tokens = torch.full((N_ROWS, row_len), PAD)
    lengths: list[int] = []
    slots: list[tuple[int, int]] = []
    asked: list[int] = []
    places: list[Place] = []
    for row in range(N_ROWS):
        at = 0
        # The second row's documents stand the other way round, so that no two of the batch have the same place.
        for number, part in enumerate(PARTS if row == 0 else PARTS[::-1]):
            n, n_slots, n_asked = max(1, row_len * part * 7 // (8 * sum(PARTS))), len(slots), len(asked)
            tokens[row, at : at + n] = _words(n, special, draw)
            tokens[row, at] = BOS
            if n >= L + 5:  # <s>, <image>, slots, </image> and two words
                tokens[row, at + 1 : at + 2 + L] = special.image
                tokens[row, at + 2 + L] = special.image_end
                slots.append((row, at + 2))
            start = row * row_len + at
            asked += sorted({start + i * (n - 1) // (ASKED - 1) for i in range(ASKED)})
            stream = slice(start, start + n)
            places.append(Place(row, number, stream, slice(n_slots, len(slots)), slice(n_asked, len(asked))))
            lengths.append(n)
            at += n
        lengths.append(row_len - at)
    targets = torch.full((N_ROWS * row_len,), IGNORE)
    targets[asked] = _words(len(asked), special, draw)
    batch = KosmosBatch(
        tokens=tokens,
        targets=targets.view(N_ROWS, row_len),
        positions=torch.cat([torch.arange(n) for n in lengths]).view(N_ROWS, row_len),
        lengths=tuple(lengths),
        loss_at=torch.tensor(asked),
        images=torch.randint(0, 256, (len(slots), 3, size, size), generator=draw, dtype=torch.uint8),
        slots=torch.tensor(slots, dtype=torch.int64).view(-1, 2),
        corpus=torch.zeros(N_ROWS, dtype=torch.int64),
        n_bytes=torch.zeros(N_ROWS, dtype=torch.int64),
        rows=(-1,) * N_ROWS,
        n_step_targets=len(asked),
        n_real=int((tokens != PAD).sum()),
        padding=(lengths[-1],) * N_ROWS,
    )
    return batch.to(device), places


def changes(batch: KosmosBatch, place: Place, special: SpecialTokens) -> Iterator[tuple[str, KosmosBatch]]:
    """Yield what changes in one document, and the batch with it: every token the next piece; every pixel inverted."""
    tokens, n_pieces = batch.tokens.flatten().clone(), special.mask - len(LEADING)
    here = tokens[place.at]
    of_image = (here == special.image) | (here == special.image_end)
    tokens[place.at] = torch.where(of_image, here, len(LEADING) + (here - len(LEADING) + 1) % n_pieces)
    yield "words", replace(batch, tokens=tokens.view_as(batch.tokens))
    if place.images.start < place.images.stop:
        images = batch.images.clone()
        images[place.images] = 255 - images[place.images]
        yield "images", replace(batch, images=images)


def _words(n: int, special: SpecialTokens, draw: torch.Generator) -> Tensor:
    return torch.randint(len(LEADING), special.mask, (n,), generator=draw)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and each of its modules in its own again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
