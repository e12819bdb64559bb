"""KosmosLit: steps, optimizer, logging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, replace
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from kosmos_lit.batch import DIGEST_MASK, KosmosBatch, PromptBatch
from kosmos_lit.checks.device import check_device, check_dtype, uses_compile
from kosmos_lit.checks.leaks import check_leaks
from kosmos_lit.checks.memory import BatchSizes, check_step_memory
from kosmos_lit.checks.ranks import IdentifiedData, check_ranks
from kosmos_lit.config import KosmosConfig, LossWeights, OptimizerConfig
from kosmos_lit.corpus_loss import CorpusLoss
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.prompts import Prompt, encode_prompt
from kosmos_lit.init_from import freeze, from_pretrained
from kosmos_lit.model import Kosmos
from kosmos_lit.nonfinite import NonFiniteSteps
from kosmos_lit.ops.schedules import warmup_linear
from kosmos_lit.resume import check_trained, kernel_change, start_at_step
from kosmos_lit.sharding.fsdp import check_strategy
from kosmos_lit.sharding.shards import clip_grad_norm, original_name
from kosmos_lit.sharding.strategy import ShardedStrategy
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.trainer_internals import attached_trainer, has_bucket_views, loss_scaler

# Keeps a seed a non-negative int64.
_MASK = (1 << 63) - 1


class TrainingData(BatchSizes, IdentifiedData, Protocol):
    """The data module as the model reads it."""

    tokenizer: Tokenizer
    kinds: Mapping[str, int]
    """Corpus kind of each named source, an index into CORPORA; in the same order on all ranks."""


class KosmosLit(L.LightningModule):
    """Trains a Kosmos by the paper's recipe.

    The loss of a step is the mean over all supervised tokens of its global batch: every micro-batch of every rank
    divides by that one count, which is known before the step (targets of documents whose image could not be decoded
    count, and give no loss). A corpus's weight scales its tokens' losses and leaves the count as it is. Dropout is a
    function of the seed and the rows of the micro-batch.
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
        tf32: bool = False,
    ) -> None:
        """Store the configuration; `configure_model` builds the model.

        Args:
            kosmos: The model.
            optimizer: AdamW and its schedule.
            loss_weights: Weight of a token of each corpus in the training loss.
            seed: Seed of initial weights and dropout.
            init_from: Checkpoint or imported folder whose weights training starts from; None: random weights. A resumed
                run continues from its own checkpoint.
            freeze: Parameters that do not train, by name or by the name of a module above them:
                decoder.embed_tokens, decoder.layers.[0-9].*, vision.
            tf32: Whether CUDA devices multiply float32 matrices in TF32, with 10 bits of mantissa instead of 23 and several
                times as fast. False: as PyTorch is set, by default not. bf16-mixed multiplies hardly any.
        """
        super().__init__()
        self.config = KosmosConfig.from_dict(kosmos)  # plain data when a checkpoint is loaded
        self.optimizer_config = OptimizerConfig.from_dict(optimizer)
        self.loss_weights = LossWeights.from_dict(loss_weights)
        self.seed, self.init_from, self.frozen = seed, init_from, list(freeze or ())
        # Plain data: a checkpoint must load without executing anything.
        resolved = replace(self.config, vision=self.config.vision.resolved())
        tables = {"kosmos": resolved, "optimizer": self.optimizer_config, "loss_weights": self.loss_weights}
        self.save_hyperparameters({name: asdict(table) for name, table in tables.items()} | {"seed": seed, "tf32": tf32})
        self.tf32, self._matmul_precision = tf32, "highest"
        self._weights: dict[torch.device, Tensor] = {}
        self._full_net: list[Kosmos] = []  # in a list, so that nn.Module does not register it as a child
        self._predicting = ExitStack()
        self.attention_kernel: str = self.config.decoder.attention_kernel
        """The kernel itself from `setup` on, where the config may say `auto`."""
        self.step_loss, self.val_loss = CorpusLoss(), CorpusLoss()
        self.nonfinite: NonFiniteSteps | None = None
        """Of a run that trains, from its start on."""
        self.grad_norm: Tensor | None = None
        """Norm of the last step's gradient before clipping."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.rows_digest = 0
        """Sum of the digests of the rows that this rank has trained on; on rank 0 also of all rows before a resume."""

    def configure_model(self) -> None:
        # Lightning calls this hook once for each of fit, validate, test and predict.
        if hasattr(self, "net"):
            return
        strategy = self._strategy
        if isinstance(strategy, ShardedStrategy):
            self.net = strategy.shard_model(self._build_model, self._outline)
        else:
            check_strategy(strategy)
            self.net = self._build_model()

    @property
    def _strategy(self) -> Strategy | None:
        trainer = attached_trainer(self)
        return trainer.strategy if trainer is not None else None

    def _outline(self) -> Kosmos:
        """Return the model on the meta device, without weights."""
        model = Kosmos.on_meta(self.config)
        freeze(model, self.frozen)
        return model

    def _build_model(self) -> Kosmos:
        # Lightning makes a GPU the default device in `configure_model`. Built there, random weights would be others than
        # the CPU's, which rank 0 of a sharded run draws, and a file's weights would meet new ones on another device. The
        # strategy moves the model to the GPU afterwards.
        with torch.device("cpu"):
            model = self._initialised_model()
        freeze(model, self.frozen)
        return model

    def _initialised_model(self) -> Kosmos:
        if self.init_from is None:
            return Kosmos.create(self.config, self.seed)
        model, own = from_pretrained(self.init_from, self.config, self.seed)
        # Outside a run there is no data whose tokenizer could differ.
        if attached_trainer(self) is not None and own is not None and own.fingerprint != self.tokenizer.fingerprint:
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
        """Corpus kind of each of the data's sources."""
        return self._data.kinds

    @property
    def rows_per_step(self) -> int:
        """Rows of the stream in an optimizer step, over all ranks."""
        return self._data.global_batch_rows

    @property
    def _data(self) -> TrainingData:
        data: TrainingData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def setup(self, stage: str) -> None:
        """Raises: UserError if the model does not fit the data or the device, or the precision is not supported."""
        if self.tf32:
            self._matmul_precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
        max_seq_len, seq_len = self.config.decoder.max_seq_len, self._data.seq_len
        if seq_len > max_seq_len:
            raise UserError(
                f"data.seq_len is {seq_len}, but model.kosmos.decoder.max_seq_len is {max_seq_len}; raise the latter"
            )
        if loss_scaler(self.trainer) is not None:
            raise UserError("trainer.precision: float16 with loss scaling is not supported; use bf16-mixed")
        rows, ids = self.config.decoder.vocab_size, self.tokenizer.vocab_size
        # More rows than ids are allowed: the others are no token's.
        if rows < ids:
            raise UserError(
                f"the tokenizer has {ids} ids, but model.kosmos.decoder.vocab_size is {rows}; set it to at least {ids}"
            )
        check_dtype(self.trainer)
        self.attention_kernel = check_device(self.trainer, self.config.decoder, seq_len, trains=stage == "fit")
        if stage == "fit":
            check_ranks(self.trainer, self.hparams, self._data, self.tokenizer.fingerprint)
            check_step_memory(self.trainer, self._data, self.config, self.frozen)

    def teardown(self, stage: str) -> None:
        if self.tf32:
            torch.set_float32_matmul_precision(self._matmul_precision)

    # ---- training

    def on_train_start(self) -> None:
        """Check attention between documents, and start at the checkpoint's step with this run's settings.

        Raises: UserError if a document's tokens or images change another document's losses.
        """
        # Before the test of attention, which so runs the layers that train.
        if uses_compile(self.config.decoder, self.device):
            self.net.compile_blocks()
        # After a checkpoint is loaded, and before the test of attention for the same reason as above.
        if self.trainer.precision == "bf16-mixed":
            self.net.vision.round_frozen(torch.bfloat16)
        self._check_leaks()
        asked = " (auto)" if self.config.decoder.attention_kernel == "auto" else ""
        rank_zero_info(f"attention kernel: {self.attention_kernel}{asked}")
        for logger in self.loggers:
            logger.log_hyperparams({"attention_kernel": self.attention_kernel})
        start_at_step(self.trainer, self.optimizer_config, self._rate)
        self.nonfinite = NonFiniteSteps(self.optimizer_config, self.rows_per_step)

    def on_train_end(self) -> None:
        self.net.vision.restore_frozen()

    def _check_leaks(self) -> None:
        check_leaks(self.trainer, self.net, self._data.seq_len, self.tokenizer.special)

    def _rate(self, step: int) -> float:
        """Return the fraction of the peak learning rate at a step."""
        c = self.optimizer_config
        return warmup_linear(step, c.warmup_steps, c.total_steps or self.trainer.max_steps)

    def check_finite(self) -> None:
        """Raises: UserError if a step's gradient had no finite norm, and that ends the run."""
        if self.nonfinite is not None:
            self.nonfinite.check()

    def on_train_batch_start(self, batch: KosmosBatch, batch_idx: int) -> None:
        # `step_loss` sums over the micro-batches of one step.
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_loss.reset()
        # A row's number is unique in the stream, so no two micro-batches share a seed, and a resumed run has the same.
        seed = (self.seed * 0x9E3779B97F4A7C15 + batch.rows[0] * 0xD1B54A32D192ED03) & _MASK
        # On a CPU run torch.manual_seed would queue the seed for CUDA's lazy start, with the call stack as text: slow.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)

    def training_step(self, batch: KosmosBatch, batch_idx: int) -> Tensor:
        self.rows_digest = (self.rows_digest + batch.digest) & DIGEST_MASK
        # Lightning divides by the micro-batches of a step, and the gradient's average over ranks by their number.
        n_micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        weights: Tensor | float = n_micro_batches / batch.n_step_targets
        if self.loss_weights != LossWeights():
            corpus = batch.corpus[batch.loss_at // batch.tokens.shape[1]]  # (S,)
            weights = self._corpus_weights(corpus.device)[corpus] * weights
        loss, nll = self.net.loss(batch, weights)
        self.step_loss.update(nll, batch)
        return loss

    def _corpus_weights(self, device: torch.device) -> Tensor:
        """Return `loss_weights` in float32 on a device."""
        # No buffer: those follow the weights' dtype, and DDP broadcasts them at each step.
        if device not in self._weights:
            self._weights[device] = torch.tensor(astuple(self.loss_weights), device=device)
        return self._weights[device]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        # Views of DDP's buckets are filled with zeros: in their place micro-batches whose gradients are not yet summed over
        # ranks would allocate others beside the buckets.
        optimizer.zero_grad(set_to_none=not has_bucket_views(self.trainer))

    def on_validation_model_zero_grad(self) -> None:
        # Lightning frees gradients before a validation; views of buckets would free nothing, and be allocated anew.
        if not has_bucket_views(self.trainer):
            super().on_validation_model_zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep the norm and the step's learning rate for the log."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # A step without images: the connector's weights decay all the same, as they do if another rank has one.
                parameter.grad = torch.zeros_like(parameter)
        # Read now: the schedule has advanced by the time that the step is logged.
        self.lr = optimizer.param_groups[0]["lr"]
        limit = gradient_clip_val or float("inf")  # Lightning's 0 means none
        strategy = self._strategy
        if isinstance(strategy, ShardedStrategy):
            self.grad_norm = clip_grad_norm(self.parameters(), limit, strategy.n_replicas)
        else:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        if self.nonfinite is not None:
            self.nonfinite.watch(self.trainer.optimizers[0], self.grad_norm, self.trainer.global_step + 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        c = self.optimizer_config
        if (c.total_steps or self.trainer.max_steps) <= 0:
            raise UserError("set trainer.max_steps (or model.optimizer.total_steps): the learning rate decays over them")
        if (algorithm := self.trainer.gradient_clip_algorithm) not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm: only norm is supported, got {algorithm.value}")
        trained = [p for p in self.parameters() if p.requires_grad]  # no state for what is frozen
        optimizer = torch.optim.AdamW(trained, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True)
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
    def full_net(self) -> Iterator[Kosmos]:
        """Yield the unsharded model, which each rank can call on its own. Collective: all ranks must enter."""
        strategy = self._strategy
        # Inside another `full_net` the copy that exists is shared.
        if self._full_net or not isinstance(strategy, ShardedStrategy):
            net = self._full_net[-1] if self._full_net else self.net
            with net.vision.unrounded():
                yield net
            return
        self._full_net.append(strategy.gather_model())
        try:
            yield self._full_net[-1]
        finally:
            self._full_net.clear()

    def on_predict_start(self) -> None:
        self._predicting.enter_context(self.full_net())  # until on_predict_end

    def on_predict_end(self) -> None:
        self._predicting.close()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        return self.generate_texts(batch)

    def generate_texts(self, batch: PromptBatch, settings: GenerationConfig = GenerationConfig()) -> list[str]:
        """Return the model's continuation of each prompt of a batch."""
        tokenizer, n_latents = self.tokenizer, self.config.connector.n_latents
        net = self._full_net[-1] if self._full_net else self.net
        prompts = [
            encode_prompt(text, n, tokenizer, n_latents) for text, n in zip(batch.prompts, batch.n_images, strict=True)
        ]
        # Stored ids replace the text, which need not encode to the same ids.
        if batch.tokens is not None:
            prompts = [Prompt.of(ids, tokenizer, n_latents) for ids in batch.tokens]
        return [c.text for c in Engine(net, tokenizer).generate_batch(prompts, batch.images, settings)]

    def _log_loss(self, prefix: str) -> None:
        metrics: dict[str, Any] = {f"{prefix}/{k}": v.float() for k, v in self.val_loss.compute().items()}
        if self.trainer.state.fn == "fit":
            metrics["step"] = float(self.trainer.global_step)  # Lightning's own count lags behind by one
        self.log_dict(metrics, sync_dist=False)  # CorpusLoss has summed over ranks
        self.val_loss.reset()

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer, so that a checkpoint is complete in itself, the attention kernel, and all rows' digest."""
        checkpoint["trained"] = self._trained()
        checkpoint["attention_kernel"] = self.attention_kernel
        checkpoint["rows_digest"] = f"{self.total_digest():016x}"
        # A bytearray, as torch warns of buffers that it could not write to.
        checkpoint["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.to_bytes()), dtype=torch.uint8)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError if a resumed run trains other parameters than those of the checkpoint's optimizer state."""
        trainer = attached_trainer(self)
        # One rank carries the digest of the past, as ranks' digests are summed.
        is_first = trainer is None or trainer.global_rank == 0
        self.rows_digest = int(checkpoint.get("rows_digest", "0"), 16) if is_first else 0
        if trainer is not None and trainer.training and checkpoint.get("trained") is not None:
            check_trained(checkpoint["trained"], self._trained())
            if change := kernel_change(checkpoint.get("attention_kernel"), self.attention_kernel):
                rank_zero_info(change)

    def total_digest(self) -> int:
        """Return the digest of all rows trained on, over all ranks. Collective: all ranks must call it."""
        trainer = attached_trainer(self)
        if trainer is None or trainer.world_size == 1:
            return self.rows_digest
        # Below 2 ** 63, so it fits int64; a sum that wraps around stays right modulo 2 ** 63.
        own = torch.tensor(self.rows_digest, device=self.device)
        return int(trainer.strategy.reduce(own, reduce_op="sum")) & DIGEST_MASK

    def _trained(self) -> list[str]:
        return [original_name(name) for name, parameter in self.named_parameters() if parameter.requires_grad]
