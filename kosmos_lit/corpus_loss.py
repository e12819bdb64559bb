"""Loss per corpus, summed over ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from kosmos_lit.batch import CORPORA, KosmosBatch


class CorpusLoss(Metric):
    """Token-mean loss of each corpus and of all together, in nats per supervised token and in bits per byte of text.

    Bits per byte compare runs with different tokenizers; nats per token do not.
    """

    full_state_update = False  # an update does not depend on earlier ones
    nll: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "bytes"):
            # float64: sums over millions of tokens.
            self.add_state(name, torch.zeros(len(CORPORA), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, batch: KosmosBatch) -> None:
        """Add a batch; `nll` is (S,) nats in the order of `batch.loss_at`."""
        rows = batch.corpus[batch.loss_at // batch.tokens.shape[1]]  # (S,)
        # Lightning casts the states with the module, and bfloat16 sums would lose tokens.
        self.nll = self.nll.double().index_add(0, rows, nll.detach().double())
        self.tokens = self.tokens.double().index_add(0, rows, torch.ones_like(rows, dtype=torch.float64))
        # A row that only completes a validation batch has corpus -1, and no bytes.
        self.bytes = self.bytes.double().index_add(0, batch.corpus.clamp(min=0), batch.n_bytes.double())

    def compute(self) -> dict[str, Tensor]:
        """Return `loss`, and `loss/CORPUS` and `bits_per_byte/CORPUS` for the corpora that occurred."""
        metrics = {"loss": self.nll.sum() / self.tokens.sum()}
        for i, name in enumerate(CORPORA):
            if self.tokens[i] > 0:
                metrics[f"loss/{name}"] = self.nll[i] / self.tokens[i]
                metrics[f"bits_per_byte/{name}"] = self.nll[i] / math.log(2) / self.bytes[i]  # nats / ln 2 are bits
        return metrics
