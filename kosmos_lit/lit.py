"""KosmosLit: steps, optimizer, what is logged."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from kosmos_lit.batch import KosmosBatch, PromptBatch
from kosmos_lit.config import KosmosConfig, OptimizerConfig
from kosmos_lit.errors import UserError
from kosmos_lit.generate import encode_prompt, generate
from kosmos_lit.metrics import CorpusLoss
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.schedules import warmup_linear
from kosmos_lit.tokens import Tokenizer

_MASK = (1 << 63) - 1


class HasTokenizer(Protocol):
    """What a data module owes the model."""

    tokenizer: Tokenizer


class KosmosLit(L.LightningModule):
    """Trains a Kosmos by the paper's recipe.

    The loss of a step is the mean over all supervised tokens of its global batch: every micro-batch of every rank
    divides by that one count, which is known before the step. Dropout's random numbers depend on seed and rows alone.
    """

    net: Kosmos

    def __init__(
        self,
        kosmos: KosmosConfig = KosmosConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        seed: int = 0,
    ) -> None:
        """Take the configuration; the model is built in `configure_model`.

        Args:
            kosmos: The model.
            optimizer: AdamW and its schedule.
            seed: Seed of initial weights and dropout.
        """
        super().__init__()
        self.config = KosmosConfig.from_dict(kosmos)  # plain data when a checkpoint is loaded
        self.optimizer_config = OptimizerConfig.from_dict(optimizer)
        self.seed = seed
        # Plain data: a checkpoint must load without executing anything.
        whole = replace(self.config, vision=self.config.vision.resolved())
        self.save_hyperparameters({"kosmos": asdict(whole), "optimizer": asdict(self.optimizer_config), "seed": seed})
        self.step_loss, self.val_loss = CorpusLoss(), CorpusLoss()
        self.grad_norm: Tensor | None = None
        """Norm of the last step's gradient before clipping."""
        self.lr = 0.0
        """Learning rate of the last step."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Kosmos.create(self.config, self.seed)

    @property
    def tokenizer(self) -> Tokenizer:
        """The data module's tokenizer."""
        data: HasTokenizer = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.tokenizer

    def setup(self, stage: str) -> None:
        """Raises: UserError if the vocabulary is too small for the tokenizer."""
        rows, ids = self.config.decoder.vocab_size, self.tokenizer.vocab_size
        if rows < ids:
            raise UserError(
                f"the tokenizer has {ids} ids, but model.kosmos.decoder.vocab_size is {rows}; set it to at least {ids}"
            )

    # ---- training

    def on_train_batch_start(self, batch: KosmosBatch, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_loss.reset()
        torch.manual_seed((self.seed * 0x9E3779B97F4A7C15 + batch.rows[0] * 0xD1B54A32D192ED03) & _MASK)

    def training_step(self, batch: KosmosBatch, batch_idx: int) -> Tensor:
        nll = self.net.nll(batch)
        self.step_loss.update(nll, batch)
        # Lightning divides by the micro-batches of a step, and the gradient's average over ranks by their number.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return nll.sum() * (share / batch.n_step_targets)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep norm and learning rate for the log: the schedule moves on before a step is logged."""
        self.lr = optimizer.param_groups[0]["lr"]
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        c = self.optimizer_config
        total = c.total_steps or self.trainer.max_steps
        if total <= 0:
            raise UserError("set trainer.max_steps (or model.optimizer.total_steps): the learning rate decays over them")
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_linear(step, c.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- evaluation

    def validation_step(self, batch: KosmosBatch, batch_idx: int) -> None:
        self.val_loss.update(self.net.nll(batch), batch)

    def on_validation_epoch_end(self) -> None:
        self._log_loss("val")

    def test_step(self, batch: KosmosBatch, batch_idx: int) -> None:
        self.val_loss.update(self.net.nll(batch), batch)

    def on_test_epoch_end(self) -> None:
        self._log_loss("test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        return self.answer(batch)

    def answer(self, batch: PromptBatch, max_new_tokens: int = 64, n_beams: int = 1) -> list[str]:
        """Return the model's continuation of each prompt of a batch."""
        tokenizer, n_latents = self.tokenizer, self.config.connector.n_latents
        prompts = [
            encode_prompt(text, n, tokenizer, n_latents)
            for text, n in zip(batch.prompts, batch.n_images, strict=True)
        ]
        written = generate(
            self.net, prompts, batch.images, tokenizer, max_new_tokens=max_new_tokens, n_beams=n_beams
        )
        return [tokenizer.decode(ids) for ids in written]

    def _log_loss(self, prefix: str) -> None:
        self.log_dict({f"{prefix}/{k}": v.float() for k, v in self.val_loss.compute().items()}, sync_dist=False)
        self.val_loss.reset()

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the tokenizer into the checkpoint, so that it can be used on its own."""
        checkpoint["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)
