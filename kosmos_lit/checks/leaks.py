"""Test for attention between documents, on the run's own model, kernel, device and precision.

A wrong mask, or a kernel that misreads it, shows in no loss curve: training works, a little too well. So before the first
step a probe batch runs through the model, then again with the tokens or images of one document perturbed, for each
document in turn. The losses of every other document must stay; with `document_attention: row`, those of every other row
and of every earlier document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor, nn

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import compute_dtype
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, IGNORE, LEADING, PAD, SpecialTokens

N_ROWS = 2
PROPORTIONS = (5, 3, 4)
"""Lengths of a row's three documents relative to one another; the last eighth of the row is padding."""
N_TARGETS = 16
"""Supervised positions of a document at most: evenly spaced, from its first to its last."""
NOISE = 4.0
"""Losses have changed if they differ by more than this many times the difference of two equal passes, which is mostly 0."""


@dataclass(frozen=True)
class ProbeDocument:
    """A document of the probe batch."""

    row: int
    number: int
    span: slice
    """Its positions in the flattened batch."""
    images: slice
    """Its images in the batch."""
    losses: slice
    """Its losses in the batch."""

    def __str__(self) -> str:
        return f"document {self.number} of row {self.row}"

    def may_see(self, other: ProbeDocument, within: str) -> bool:
        """Return whether this document may attend to another one under `document_attention` `within`."""
        return within == "row" and self.row == other.row and self.number > other.number


def check_leaks(trainer: L.Trainer, model: Kosmos, row_len: int, special: SpecialTokens) -> None:
    """Make sure that no document attends to another one that it must not see. Collective: all ranks call it and agree.

    Raises: UserError naming the two documents.
    """
    with trainer.precision_plugin.forward_context():  # autocast as in training
        leak = find_leak(model, row_len, special)
    if not trainer.strategy.reduce_boolean_decision(leak is None, all=True):
        kernel, device = model.config.decoder.attention_kernel, trainer.strategy.root_device
        dtype = compute_dtype(trainer.precision)
        raise UserError(
            f"attention leaks: {leak or 'on another rank'} (decoder.attention_kernel: {kernel}, {dtype}, {device}): "
            "training with it is worthless; set the kernel to sdpa, and report this"
        )


def find_leak(model: Kosmos, row_len: int, special: SpecialTokens) -> str | None:
    """Return a sentence that names a leak between documents, or None.

    The model runs in evaluation mode, without gradient, and in the caller's precision context. A document whose own tokens
    do not change its losses counts as a leak too: the test would prove nothing.

    Raises: UserError if the kernel refuses these tensors, or the losses are not finite.
    """
    batch, documents = probe_batch(model.config, row_len, special, model.decoder.embed_tokens.weight.device)
    with torch.no_grad(), evaluation_mode(model):
        try:
            baseline, repeat = model.nll(batch), model.nll(batch)  # two equal passes, for the noise
        except NotImplementedError as error:
            kernel = model.config.decoder.attention_kernel
            raise UserError(f"decoder.attention_kernel: {kernel} does not run here ({error}); set it to sdpa") from error
        if not baseline.isfinite().all():
            raise UserError("the model's losses are not finite before the first step; weights or precision are wrong")
        # Kernels that add up in varying order differ between equal passes; only changes beyond that are leaks.
        noise = NOISE * float((baseline - repeat).abs().max())
        for changed in documents:
            for part, perturbed in perturbations(batch, changed, special):
                # NaN compares false with everything, and would pass for no change.
                change = (model.nll(perturbed) - baseline).abs().nan_to_num(nan=float("inf"))
                if part == "tokens" and not float(change[changed.losses].max()) > noise:
                    return f"the losses of {changed} stay the same when its own tokens change"
                for document in documents:
                    largest = float(change[document.losses].max())
                    allowed = document == changed or document.may_see(changed, model.config.decoder.document_attention)
                    if largest > noise and not allowed:
                        return f"the losses of {document} change by up to {largest:.2g} nats with the {part} of {changed}"
    return None


def probe_batch(
    config: KosmosConfig, row_len: int, special: SpecialTokens, device: torch.device
) -> tuple[KosmosBatch, list[ProbeDocument]]:
    """Return a batch of rows of three documents and padding, and its documents.

    A document starts with an image if it is long enough for one; some of its positions are supervised.
    """
    # Its own generator: the run's random numbers stay as they are.
    generator, size, L = torch.Generator().manual_seed(0), config.vision.image_size, config.connector.n_latents
    tokens = torch.full((N_ROWS, row_len), PAD)
    lengths: list[int] = []
    slots: list[tuple[int, int]] = []
    loss_at: list[int] = []
    documents: list[ProbeDocument] = []
    for row in range(N_ROWS):
        at = 0
        # The second row has the reverse order, so that no two documents of the batch have the same place in a row.
        for number, part in enumerate(PROPORTIONS if row == 0 else PROPORTIONS[::-1]):
            # A document's share of seven eighths of the row, one position at least.
            n, n_slots, n_losses = max(1, row_len * part * 7 // (8 * sum(PROPORTIONS))), len(slots), len(loss_at)
            tokens[row, at : at + n] = _random_tokens(n, special, generator)
            tokens[row, at] = BOS
            if n >= L + 5:  # <s>, <image>, slots, </image> and two tokens
                # <image> and its slots have one id.
                tokens[row, at + 1 : at + 2 + L] = special.image
                tokens[row, at + 2 + L] = special.image_end
                slots.append((row, at + 2))
            start = row * row_len + at
            # A set, as a short document yields positions more than once.
            loss_at += sorted({start + i * (n - 1) // (N_TARGETS - 1) for i in range(N_TARGETS)})
            images, losses = slice(n_slots, len(slots)), slice(n_losses, len(loss_at))
            documents.append(ProbeDocument(row, number, slice(start, start + n), images, losses))
            lengths.append(n)
            at += n
        lengths.append(row_len - at)  # padding is a document of its own
    targets = torch.full((N_ROWS * row_len,), IGNORE)
    targets[loss_at] = _random_tokens(len(loss_at), special, generator)
    batch = KosmosBatch(
        tokens=tokens,
        targets=targets.view(N_ROWS, row_len),
        positions=torch.cat([torch.arange(n) for n in lengths]).view(N_ROWS, row_len),
        lengths=tuple(lengths),
        loss_at=torch.tensor(loss_at),
        images=torch.randint(0, 256, (len(slots), 3, size, size), generator=generator, dtype=torch.uint8),
        slots=torch.tensor(slots, dtype=torch.int64).view(-1, 2),
        corpus=torch.zeros(N_ROWS, dtype=torch.int64),
        n_bytes=torch.zeros(N_ROWS, dtype=torch.int64),
        rows=(-1,) * N_ROWS,  # no rows of the stream
        n_step_targets=len(loss_at),
        n_real=int((tokens != PAD).sum()),
        padding=(lengths[-1],) * N_ROWS,
    )
    return batch.to(device), documents


def perturbations(batch: KosmosBatch, document: ProbeDocument, special: SpecialTokens) -> Iterator[tuple[str, KosmosBatch]]:
    """Yield the batch with one document's tokens each replaced by the next piece, and with its images inverted."""
    tokens, n_pieces = batch.tokens.flatten().clone(), special.mask - len(LEADING)
    own = tokens[document.span]
    of_image = (own == special.image) | (own == special.image_end)  # kept: slots must match the images
    # Modulo keeps <s>, whose difference is negative, among the pieces too.
    tokens[document.span] = torch.where(of_image, own, len(LEADING) + (own - len(LEADING) + 1) % n_pieces)
    yield "tokens", replace(batch, tokens=tokens.view_as(batch.tokens))
    if document.images.start < document.images.stop:
        images = batch.images.clone()
        images[document.images] = 255 - images[document.images]
        yield "images", replace(batch, images=images)


def _random_tokens(n: int, special: SpecialTokens, generator: torch.Generator) -> Tensor:
    # Ids of text lie between the leading control tokens and <mask>.
    return torch.randint(len(LEADING), special.mask, (n,), generator=generator)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]  # parts of a model may be in different modes
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
