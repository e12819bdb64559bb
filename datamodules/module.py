"""The LightningDataModule that mixes text, caption, interleaved and instruct corpora: it wires the chain, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from datamodules.blocklist import Blocklist
from datamodules.config import CorpusConfig, RatioConfig, RatioStage, TokenizerConfig, Unit
from datamodules.forecast import largest_micro_batch, last_step
from datamodules.loader import BatchLayout, FiniteLoader, Loader, MicroBatches, PromptLoader, RenderOptions, n_micro_batches
from datamodules.mixture.history import History
from datamodules.mixture.schedule import Phase, build_schedule
from datamodules.mixture.shares import name_sources, ratios_by_step, row_shares
from datamodules.mixture.steps import Steps
from datamodules.packing import RowLayout
from datamodules.packing.row_plan import VERSION
from datamodules.prepared_source import PreparedSource, describe_sources, open_tokenizer, prepare_source, prepare_tokenizer
from datamodules.prompt_batches import caption_prompts, example_prompts
from datamodules.quarantine import LEDGER, Ledger
from datamodules.resume import DataState
from datamodules.stream import Row, SequentialSchedule, Stream
from datamodules.trainer import is_fitting, limit_steps, resumed_checkpoint, set_accumulation
from kosmos_lit.batch import CORPORA, PromptBatch
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit


class MixtureData(L.LightningDataModule):
    """Rows of the corpora by ratio: the same rows on any number of ranks and workers, from any row on."""

    default_ratio: ClassVar[Sequence[float]] = (5.0, 5.0, 2.0, 0.0)  # in the order of CORPORA
    """Shares of the configured corpora: the paper's batch."""

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        text: CorpusConfig | None = None,
        caption: CorpusConfig | None = None,
        interleaved: CorpusConfig | None = None,
        ratio: RatioConfig = RatioConfig(),  # frozen, so that all instances may share it
        seq_len: int = 2048,
        global_batch_rows: int = 12,
        micro_batch_rows: int = 1,
        n_latents: int = 64,
        image_size: int = 224,
        image_fit: Fit = "crop",
        val_rows: int = 64,
        num_workers: int = 2,
        prepare_workers: int = 1,
        seed: int = 0,
        prompt: str = "An image of",
        instruct: CorpusConfig | None = None,
        sources: dict[str, CorpusConfig | None] | None = None,
        unit: Unit = "tokens",
        ratio_stages: list[RatioStage] | None = None,
        accept_changes: bool = False,
        block_documents: int = 1 << 17,
        run_documents: int = 1 << 12,
        blocklist: list[str] | None = None,
        quarantine: str | None = None,
    ) -> None:
        """Take the corpora and how to mix them.

        Args:
            tokenizer: The tokenizer of all corpora.
            text: Documents of text.
            caption: Pairs of an image and its caption.
            interleaved: Pages of text and images.
            ratio: Shares of the kinds, by default 5 : 5 : 2 : 0 of the configured ones; one with share 0 is not opened.
            seq_len: Positions in a row.
            global_batch_rows: Rows of one optimizer step, over all ranks and micro-batches.
            micro_batch_rows: Rows that one rank puts through the model at a time.
            n_latents: Slots of an image; linked to the model's connector.
            image_size: Side of an image in pixels; linked to the model's tower.
            image_fit: How an image becomes square.
            val_rows: Rows of each source for `validate` at most; `test` takes all held-out rows.
            num_workers: Processes that render rows and decode images, per rank; 0: the training process itself.
            prepare_workers: Processes that build indexes and count rows.
            seed: Seed of packing and order.
            prompt: Prompt of `predict` for the held-out captions' images.
            instruct: Prompts with completions, and conversations; loss on the completions and answers alone.
            sources: More sources by name; the format decides the kind, and `weight` is the share among those of its kind;
                null removes one that another file names.
            unit: Unit of ratios and weights; in every unit, every prefix of the rows has the shares.
            ratio_stages: Ratios that hold from later optimizer steps on.
            accept_changes: Resume although ratios, weights or the list of sources differ from the checkpoint's run.
            block_documents: Documents that are shuffled among each other; blocks are read in a random order.
            run_documents: Neighbouring documents that stay in one block, so that reads are local.
            blocklist: Patterns of files with keys, URLs and hashes of images that must not be learnt; applied as rows
                are read, without changes to shards or indexes.
            quarantine: File that lists the bad samples of training; None: quarantine.jsonl in the run's folder.
        """
        super().__init__()
        self.prepare_data_per_node = False  # nodes share a file system: one process prepares for all
        self.tokenizer_config = tokenizer
        by_kind = {"text": text, "caption": caption, "interleaved": interleaved, "instruct": instruct}
        named = name_sources(by_kind, sources)
        self.unit, self.accept_changes = unit, accept_changes
        self.ratios = ratios_by_step(ratio, ratio_stages, self.default_ratio, named.values())
        # In any stage: a kind that only a later one reads is opened from the start.
        is_used = [any(ratio[kind] for _, ratio in self.ratios) for kind in range(len(CORPORA))]
        self.sources = {n: s for n, s in named.items() if is_used[s.kind] and s.config.weight}
        sizes = {"seq_len": seq_len, "global_batch_rows": global_batch_rows, "micro_batch_rows": micro_batch_rows}
        sizes |= {"val_rows": val_rows, "block_documents": block_documents, "run_documents": run_documents}
        for name, value in sizes.items():
            if value <= 0:
                raise UserError(f"data.{name} must be positive, got {value}")
        self.seq_len, self.global_batch_rows, self.micro_batch_rows = seq_len, global_batch_rows, micro_batch_rows
        self.n_latents, self.image_size, self.image_fit = n_latents, image_size, image_fit
        self.val_rows, self.num_workers, self.prepare_workers = val_rows, num_workers, prepare_workers
        self.seed, self.prompt = seed, prompt
        self.block_documents, self.run_documents, self.quarantine = block_documents, run_documents, quarantine
        self.blocklist = Blocklist.load(blocklist) if blocklist else None
        self.prepared: dict[str, PreparedSource] = {}
        self.steps = Steps.constant(global_batch_rows)
        self._resumed_from: str | None = None  # the checkpoint whose data state was loaded
        self._configured_trainer: L.Trainer | None = None

    @property
    def kinds(self) -> dict[str, int]:
        """Return the kind of each source, an index into CORPORA, by name."""
        return self.history.kinds

    # ---- preparation

    def prepare_data(self) -> None:
        """Build the tokenizer, the indexes and the row counts that are missing."""
        prepare_tokenizer(self.tokenizer_config, self.sources.values())
        for source in self.sources.values():
            prepare_source(source, self.tokenizer_config.path, self.prepare_workers)
        # Counts all blocks and stores the counts, which the other ranks read in `setup`.
        self._open_sources(self.prepare_workers)

    def _open_sources(self, workers: int) -> None:
        self.tokenizer = open_tokenizer(self.tokenizer_config)
        layout = RowLayout(
            seq_len=self.seq_len,
            n_latents=self.n_latents,
            seed=self.seed,
            block_documents=self.block_documents,
            run_documents=self.run_documents,
        )
        self.prepared = {n: PreparedSource(s, self.tokenizer, layout, workers) for n, s in self.sources.items()}

    def open(self) -> None:
        """Open tokenizer and indexes, and plan the rows of both splits.

        Raises: UserError if one is missing, or was made of other files or with other options.
        """
        if not self.prepared:  # the process that prepared them has opened them already
            self._open_sources(1)
        self._set_history(self._configured_history(self.steps))

    def setup(self, stage: str) -> None:
        self.open()
        # Validation, tests and prediction have no optimizer steps.
        if self.trainer is not None and stage == "fit" and self.trainer is not self._configured_trainer:
            G, m, W = self.global_batch_rows, self.micro_batch_rows, self.trainer.world_size
            reason = f"{G} rows a step on {W} ranks with micro-batches of {m}"
            set_accumulation(self.trainer, n_micro_batches(G, m, W), reason)
            self._configured_trainer = self.trainer  # a second fit of the same trainer must not set it again

    def describe(self, n_steps: int) -> str:
        """Return a table of the sources, and of how much of each `n_steps` optimizer steps read."""
        n_rows = self.steps.row(max(0, n_steps))
        n_read = dict(zip(self.kinds, self.schedule.counts(n_rows), strict=True))
        return describe_sources(self.prepared, n_read, n_rows, self.seq_len)

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return about how many images and supervised tokens a micro-batch holds at most."""
        return largest_micro_batch(self.prepared, self.kinds, self.schedule, self.micro_batch_rows)

    # ---- streams

    def stream(self, split: str = "train") -> Stream:
        """Return the rows of `train` (endless) or `val` (each held-out row once, source by source)."""
        if split == "train":
            # None: a source of past rows that is no longer configured.
            packed = [self.prepared[n].train if n in self.prepared else None for n in self.kinds]
            return Stream(packed, self.schedule, self.tokenizer.special, self.seq_len)
        return self._val_stream(None)[0]

    def n_val_rows(self) -> int:
        """Return the number of rows of the `val` stream."""
        return self._val_stream(None)[1]

    def _val_stream(self, max_rows: int | None) -> tuple[Stream, int]:
        """Return the held-out rows, of each source `max_rows` at most, and their number."""
        held_out = [source.val for source in self.prepared.values() if source.val is not None]
        if not held_out:
            raise UserError("no corpus has held-out documents; raise val_share of a corpus")
        counts = [packed.plan.n_rows for packed in held_out]
        schedule = SequentialSchedule([min(c, max_rows) if max_rows is not None else c for c in counts])
        return Stream(held_out, schedule, self.tokenizer.special, self.seq_len), schedule.n_rows

    def apply_blocklist(self, row: Row) -> tuple[Row, dict[int, str]]:
        """Return a row as the model reads it, and the blocklist's entry for each blocked segment, by its index."""
        if self.blocklist is None:
            return row, {}
        return self.blocklist.apply(row, self.prepared[row.source].corpus, self.tokenizer.special)

    # ---- loaders

    def train_dataloader(self) -> Iterable[Any]:
        """Return the micro-batches from the next step on.

        Raises: UserError if the trainer goes on from a checkpoint without the state of such data, or if `max_epochs` of a
        source had ended training.
        """
        first_row = 0
        if self.trainer is not None:
            path = resumed_checkpoint(self.trainer)
            # Lightning calls `load_state_dict` only if the checkpoint has a state under this class's name.
            if path is not None and path != self._resumed_from:
                raise UserError(
                    f"{path} is of a run with another kind of data than {type(self).__name__}: resume with that run's data, "
                    "or start anew from its weights with model.init_from"
                )
            self._limit_steps(self.trainer)  # before the table, which says how much is read by then
            rank_zero_info(self.describe(self.trainer.max_steps))
            if self.blocklist is not None:
                rank_zero_info(f"blocklist: {len(self.blocklist):,} entries")
            first_row = self.steps.row(self.trainer.global_step)
        return Loader(MicroBatches(self.stream(), self._batch_layout(first_row), self._render_options()), self.num_workers)

    def _limit_steps(self, trainer: L.Trainer) -> None:
        """End training with the last whole step before a source has been read `max_epochs` times."""
        if (end := last_step(self.prepared, self.kinds, self.schedule, self.steps)) is None:
            return
        # `max_steps` is read now, as `limit_steps` changes it.
        (last, reason), step, configured = end, trainer.global_step, trainer.max_steps
        if last < max(1, step):
            raise UserError(f"after step {last:,} {reason}, and the run is at step {step:,}; raise max_epochs")
        if limit_steps(trainer, last):
            rank_zero_info(f"training ends with step {last:,}, not {configured:,}: then {reason}")

    def val_dataloader(self) -> Iterable[Any]:
        return self._finite_loader(self.val_rows)

    def test_dataloader(self) -> Iterable[Any]:
        return self._finite_loader(None)

    def _finite_loader(self, max_rows: int | None) -> FiniteLoader:
        stream, n_rows = self._val_stream(max_rows)
        return FiniteLoader(MicroBatches(stream, self._batch_layout(0), self._render_options(), n_rows), self.num_workers)

    def predict_dataloader(self) -> Iterable[Any]:
        """Return prompts about the images of held-out caption pairs, and those of held-out examples."""
        if not any(source.val is not None for kind in ("caption", "instruct") for source in self._of_kind(kind)):
            raise UserError("predict takes held-out caption pairs and examples, but there are none")
        return PromptLoader(lambda: chain(self.caption_prompts(), self.instruct_prompts()), self.seq_len)

    def caption_prompts(self) -> Iterator[PromptBatch]:
        """Yield prompts about held-out captions' images, if there are any."""
        for source in self._of_kind("caption"):
            yield from caption_prompts(source.corpus, self._held_out(source), self.tokenizer, self.image_size, self.prompt)

    def instruct_prompts(self) -> Iterator[PromptBatch]:
        """Yield the prompts of held-out examples, if there are any."""
        for source in self._of_kind("instruct"):
            yield from example_prompts(source.corpus, self._held_out(source), self._render_options(), self.seq_len)

    def _held_out(self, source: PreparedSource) -> Iterator[int]:
        for document in source.held_out():
            # Skipped, not masked: a prompt is no row, where places must stay.
            if self.blocklist is None or self.blocklist.match(source.corpus, document) is None:
                yield document

    def _of_kind(self, kind: str) -> list[PreparedSource]:
        return [source for source in self.prepared.values() if CORPORA[source.kind] == kind]

    def _batch_layout(self, first_row: int) -> BatchLayout:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchLayout(
            first_row=first_row,
            global_batch_rows=self.global_batch_rows,
            micro_batch_rows=self.micro_batch_rows,
            rank=rank,
            world_size=world,
        )

    def _render_options(self) -> RenderOptions:
        return RenderOptions(
            tokenizer=self.tokenizer,
            image_size=self.image_size,
            fit=self.image_fit,
            n_latents=self.n_latents,
            max_bad_share={n: s.config.max_bad_share for n, s in self.sources.items()},
            ledger=self._ledger(),
            blocklist=self.blocklist,
            unit=self.unit,
        )

    def _ledger(self) -> Ledger | None:
        folder = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        path = self.quarantine or (folder and folder / LEDGER)
        return Ledger(path) if path else None

    # ---- history and resume

    def _configured_history(self, steps: Steps) -> History:
        """Return the history of a run that has this configuration from row 0 on, with the rows of `steps`."""
        totals = {name: source.train.plan.totals for name, source in self.prepared.items()}
        sources = list(self.sources.values())
        stages = tuple(row_shares(steps.row(step), ratio, sources, totals, self.unit) for step, ratio in self.ratios)
        # What changes a row: ranks, workers and micro-batches do not.
        names = ("seed", "seq_len", "n_latents", "image_size", "image_fit", "block_documents", "run_documents")
        rules = {n: getattr(self, n) for n in names} | {"tokenizer": self.tokenizer.fingerprint, "packing": VERSION}
        return History(rules, {n: s.contents for n, s in self.prepared.items()}, [Phase(0, stages)])

    def _set_history(self, history: History) -> None:
        self.history, self.schedule = history, build_schedule(history.phases, history.kinds)

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows, as plain data: equal on all ranks."""
        return self.history.to_dict()

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return DataState(self.trainer.global_step, self.steps, self.history).to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: UserError if the rows to come are not those of the checkpoint's run, unless the change is accepted."""
        assert self.trainer is not None
        if not is_fitting(self.trainer):
            return  # held-out rows and prompts may be of any data
        for change in self._resume(state_dict, accept=self.accept_changes):
            rank_zero_info(f"from row {state_dict['next_row']:,} on: {change}")
        self._resumed_from = resumed_checkpoint(self.trainer)

    def restore_history(self, state_dict: dict[str, Any]) -> None:
        """Take over past rows from a checkpoint's data state, whatever this configuration's shares are."""
        self._resume(state_dict, accept=True)

    def _resume(self, state_dict: dict[str, Any], *, accept: bool) -> list[str]:
        state, changes = DataState.from_dict(state_dict).resume(
            self._configured_history, self.global_batch_rows, accept=accept
        )
        self.steps = state.steps
        self._set_history(state.history)
        return changes
