"""KosmosLit: steps, optimizer, what is logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, replace
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from kosmos_lit.batch import DIGEST_MASK, KosmosBatch, PromptBatch
from kosmos_lit.checks.device import check_device, uses_compile
from kosmos_lit.checks.leaks import check_leaks
from kosmos_lit.checks.memory import Rows, check_step_memory
from kosmos_lit.config import KosmosConfig, LossWeights, OptimizerConfig
from kosmos_lit.corpus_loss import CorpusLoss
from kosmos_lit.errors import UserError
from kosmos_lit.inference.generate import GenerationConfig, Prompt, encode_prompt, generate
from kosmos_lit.init_from import freeze, initialise_from
from kosmos_lit.model import Kosmos
from kosmos_lit.ops.schedules import warmup_linear
from kosmos_lit.sharding.fsdp import check_strategy
from kosmos_lit.sharding.shards import clip_grad_norm, plain
from kosmos_lit.sharding.strategy import Sharded
from kosmos_lit.tokenizer import Tokenizer

_MASK = (1 << 63) - 1


class TokenData(Rows, Protocol):
    """What a data module owes the model."""

    tokenizer: Tokenizer
    kinds: Mapping[str, int]
    """The kind of each source, an index into CORPORA, by name, in the same order on all ranks."""

class KosmosLit(L.LightningModule):
    """Trains a Kosmos by the paper's recipe.

    The loss of a step is the mean over all supervised tokens of its global batch: every micro-batch of every rank
    divides by that one count, which is known before the step (targets of documents whose image could not be decoded
    count, and give no loss). A corpus's weight scales its tokens' losses and leaves the count as it is. Dropout's
    random numbers follow from the seed and the rows of the micro-batch.
    """

    net: Kosmos

    def __init__(
        self,
        kosmos: KosmosConfig = KosmosConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        loss_weights: LossWeights = LossWeights(),
        seed: int = 0,
        init_from: str | None = None,
        freeze: list[str] | None = None,
    ) -> None:
        """Take the configuration; the model is built in `configure_model`.

        Args:
            kosmos: The model.
            optimizer: AdamW and its schedule.
            loss_weights: What a token of each corpus counts in training.
            seed: Seed of initial weights and dropout.
            init_from: Checkpoint or imported folder whose weights training starts from; None: random weights. A run that
                is resumed goes on from its own checkpoint.
            freeze: Names of parameters that do not train, or of what they lie below: decoder.embed_tokens,
                decoder.layers.[0-9].*, vision.
        """
        super().__init__()
        self.config = KosmosConfig.from_dict(kosmos)  # plain data when a checkpoint is loaded
        self.optimizer_config = OptimizerConfig.from_dict(optimizer)
        self.loss_weights = LossWeights.from_dict(loss_weights)
        self.seed, self.init_from, self.frozen = seed, init_from, list(freeze or ())
        # Plain data: a checkpoint must load without executing anything.
        whole = replace(self.config, vision=self.config.vision.resolved())
        tables = {"kosmos": whole, "optimizer": self.optimizer_config, "loss_weights": self.loss_weights}
        self.save_hyperparameters({name: asdict(table) for name, table in tables.items()} | {"seed": seed})
        self._weights: dict[torch.device, Tensor] = {}
        self._whole: list[Kosmos] = []  # in a list, as it is no part of this module
        self._predicting = ExitStack()
        self.step_loss, self.val_loss = CorpusLoss(), CorpusLoss()
        self.grad_norm: Tensor | None = None
        """Norm of the last step's gradient before clipping."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.rows_digest = 0
        """Sum of the digests of the rows that this rank has trained on, and of all before a resume on the first rank."""

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        strategy = self._strategy
        if isinstance(strategy, Sharded):
            self.net = strategy.distribute(self._new_model, self._outline)
        else:
            check_strategy(strategy)
            self.net = self._new_model()

    @property
    def _strategy(self) -> Strategy | None:
        return self.trainer.strategy if self._trainer is not None else None

    def _outline(self) -> Kosmos:
        """Return the model without its weights."""
        model = Kosmos.outline(self.config)
        freeze(model, self.frozen)
        return model

    def _new_model(self) -> Kosmos:
        model = self._started()
        freeze(model, self.frozen)
        return model

    def _started(self) -> Kosmos:
        if self.init_from is None:
            return Kosmos.create(self.config, self.seed)
        model = initialise_from(self.init_from, self.config, self.seed)
        own = model.tokenizer
        if self._trainer is not None and own is not None and own.fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"model.init_from: {self.init_from} was trained with tokenizer {own.fingerprint}, but the data's is "
                f"{self.tokenizer.fingerprint}: give data.tokenizer.path the tokenizer that belongs to those weights"
            )
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """The data module's tokenizer."""
        return self._data.tokenizer

    @property
    def kinds(self) -> Mapping[str, int]:
        """The kind of each of the data's sources."""
        return self._data.kinds

    @property
    def _data(self) -> TokenData:
        data: TokenData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def setup(self, stage: str) -> None:
        """Raises: UserError if the model does not fit the data or the device, or the precision is not supported."""
        longest, wanted = self.config.decoder.max_seq_len, self._data.seq_len
        if wanted > longest:
            raise UserError(f"data.seq_len is {wanted}, but model.kosmos.decoder.max_seq_len is {longest}; raise the latter")
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("trainer.precision: float16 with loss scaling is not supported; use bf16-mixed")
        rows, ids = self.config.decoder.vocab_size, self.tokenizer.vocab_size
        if rows < ids:
            raise UserError(
                f"the tokenizer has {ids} ids, but model.kosmos.decoder.vocab_size is {rows}; set it to at least {ids}"
            )
        check_device(self.trainer, self.config.decoder, wanted, trains=stage == "fit")
        if stage == "fit":
            check_step_memory(self.trainer, self._data, self.config, self.frozen)

    # ---- training

    def on_train_start(self) -> None:
        """Refuse to train if documents see each other; after a resume, go on at a whole step with this run's settings.

        Raises: UserError if a document's words or images move another document's losses.
        """
        if uses_compile(self.config.decoder, self.device):
            self.net.fuse()
        self._check_leaks()
        step, c = self.trainer.global_step, self.optimizer_config
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        for counts in (progress.current, progress.total):
            shift = step * self.trainer.accumulate_grad_batches - counts.ready
            for name, count in vars(counts).items():  # ready, started, processed, completed
                setattr(counts, name, count + shift)
        settings = {"initial_lr": c.lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        for group in self.trainer.optimizers[0].param_groups:
            group |= settings | {"lr": c.lr * self._rate(step)}
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [c.lr] * len(config.scheduler.base_lrs)

    def _check_leaks(self) -> None:
        check_leaks(self.trainer, self.net, self._data.seq_len, self.tokenizer.special)

    def _rate(self, step: int) -> float:
        """Return the fraction of the peak learning rate at a step."""
        c = self.optimizer_config
        return warmup_linear(step, c.warmup_steps, c.total_steps or self.trainer.max_steps)

    def check_finite(self) -> None:
        """Raises: UserError if the last step's gradient had no finite norm."""
        if self.grad_norm is not None and not torch.isfinite(self.grad_norm):
            raise UserError(
                f"step {self.trainer.global_step}: the gradient's norm is {float(self.grad_norm)}; no checkpoint is written "
                "any more. Resume from the last one with a smaller learning rate, a longer warm-up or stronger clipping"
            )

    def on_train_batch_start(self, batch: KosmosBatch, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_loss.reset()
        seed = (self.seed * 0x9E3779B97F4A7C15 + batch.rows[0] * 0xD1B54A32D192ED03) & _MASK
        # Where no device is in use, torch.manual_seed still keeps the seed, and the whole call stack as text, for later.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)

    def training_step(self, batch: KosmosBatch, batch_idx: int) -> Tensor:
        self.rows_digest = (self.rows_digest + batch.digest) & DIGEST_MASK
        # Lightning divides by the micro-batches of a step, and the gradient's average over ranks by their number.
        share = self.trainer.accumulate_grad_batches * self.trainer.world_size
        weights: Tensor | float = share / batch.n_step_targets
        if self.loss_weights != LossWeights():
            corpus = batch.corpus[batch.loss_at // batch.tokens.shape[1]]  # (S,)
            weights = self._corpus_weights(corpus.device)[corpus] * weights
        loss, nll = self.net.loss(batch, weights)
        self.step_loss.update(nll, batch)
        return loss

    def _corpus_weights(self, device: torch.device) -> Tensor:
        """`loss_weights` in float32; no buffer, as those follow the weights' dtype and are sent among ranks at each step."""
        if device not in self._weights:
            self._weights[device] = torch.tensor(astuple(self.loss_weights), device=device)
        return self._weights[device]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep norm and learning rate for the log: the schedule moves on before a step is logged."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # A step without images: the connector decays all the same, as it does where other ranks have some.
                parameter.grad = torch.zeros_like(parameter)
        self.lr = optimizer.param_groups[0]["lr"]
        limit = gradient_clip_val or float("inf")  # Lightning's 0 means none
        clip = clip_grad_norm if isinstance(self._strategy, Sharded) else torch.nn.utils.clip_grad_norm_
        self.grad_norm = clip(self.parameters(), limit)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        c = self.optimizer_config
        if (c.total_steps or self.trainer.max_steps) <= 0:
            raise UserError("set trainer.max_steps (or model.optimizer.total_steps): the learning rate decays over them")
        if (way := self.trainer.gradient_clip_algorithm) not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm: only norm is supported, got {way.value}")
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
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

    @contextmanager
    def whole_net(self) -> Iterator[Kosmos]:
        """Have the whole model on each rank meanwhile, so that `answer` can be called on some of them: all must enter."""
        strategy = self._strategy
        if self._whole or not isinstance(strategy, Sharded):
            yield self._whole[-1] if self._whole else self.net
            return
        self._whole.append(strategy.whole())
        try:
            yield self._whole[-1]
        finally:
            self._whole.clear()

    def on_predict_start(self) -> None:
        self._predicting.enter_context(self.whole_net())

    def on_predict_end(self) -> None:
        self._predicting.close()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        return self.answer(batch)

    def answer(self, batch: PromptBatch, settings: GenerationConfig = GenerationConfig()) -> list[str]:
        """Return the model's continuation of each prompt of a batch."""
        tokenizer, n_latents = self.tokenizer, self.config.connector.n_latents
        net = self._whole[-1] if self._whole else self.net
        prompts = [
            encode_prompt(text, n, tokenizer, n_latents)
            for text, n in zip(batch.prompts, batch.n_images, strict=True)
        ]
        if batch.tokens is not None:
            prompts = [Prompt.of(ids, tokenizer, n_latents) for ids in batch.tokens]
        return [written.text for written in generate(net, prompts, batch.images, tokenizer, settings)]

    def _log_loss(self, prefix: str) -> None:
        found: dict[str, Any] = {f"{prefix}/{k}": v.float() for k, v in self.val_loss.compute().items()}
        if self.trainer.state.fn == "fit":
            found["step"] = float(self.trainer.global_step)  # Lightning's own count lags behind by one
        self.log_dict(found, sync_dist=False)
        self.val_loss.reset()

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer, so that a checkpoint can be used on its own, and the digest of all rows trained on."""
        checkpoint["trained"] = self._trained()
        checkpoint["rows_digest"] = f"{self.total_digest():016x}"
        checkpoint["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.to_bytes()), dtype=torch.uint8)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError if training is to go on with other parameters than those that the optimizer's state is of."""
        first = self._trainer is None or self.trainer.global_rank == 0
        self.rows_digest = int(checkpoint.get("rows_digest", "0"), 16) if first else 0
        there, here = checkpoint.get("trained"), self._trained()
        if self._trainer is None or not self.trainer.training or there is None or there == here:
            return
        changed = sorted(set(there) ^ set(here))
        raise UserError(
            f"the checkpoint's run trained {len(there)} parameters, this one {len(here)}, {changed[0]} for one differs: "
            "resume with that run's model.freeze and vision.trainable, or start anew from its weights with model.init_from"
        )

    def total_digest(self) -> int:
        """Return the digest of all rows trained on, over all ranks: they must all ask."""
        if self._trainer is None or self.trainer.world_size == 1:
            return self.rows_digest
        mine = torch.tensor(self.rows_digest, device=self.device)
        return int(self.trainer.strategy.reduce(mine, reduce_op="sum")) & DIGEST_MASK

    def _trained(self) -> list[str]:
        return [plain(name) for name, parameter in self.named_parameters() if parameter.requires_grad]
