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
from datamodules.loader import BatchLayout, FiniteLoader, Loader, MicroBatches, PromptLoader, RenderOptions, micro_batches
from datamodules.mixture.history import History
from datamodules.mixture.schedule import Phase, build_schedule
from datamodules.mixture.shares import name_sources, ratios_by_step, row_shares
from datamodules.mixture.steps import Steps
from datamodules.packing import RowLayout
from datamodules.packing.row_plan import VERSION
from datamodules.prepared_source import PreparedSource, describe_sources, open_tokenizer, prepare_source, prepare_tokenizer
from datamodules.prompt_batches import caption_prompts_of, example_prompts_of
from datamodules.quarantine import LEDGER, Ledger
from datamodules.stream import SequentialSchedule, Row, Stream
from kosmos_lit.batch import CORPORA, PromptBatch
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit


class MixtureData(L.LightningDataModule):
    """Rows of the corpora by ratio; the same rows on any number of ranks and workers, from any row on."""

    default_ratio: ClassVar[Sequence[float]] = (5.0, 5.0, 2.0, 0.0)
    """Shares of the corpora that are given: the paper's batch."""

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        text: CorpusConfig | None = None,
        caption: CorpusConfig | None = None,
        interleaved: CorpusConfig | None = None,
        ratio: RatioConfig = RatioConfig(),
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
            ratio: Shares of the kinds, by default 5 : 5 : 2 : 0 of those that are given; one with share 0 is not opened.
            seq_len: Positions in a row.
            global_batch_rows: Rows of one optimizer step, over all ranks and micro-batches.
            micro_batch_rows: Rows that one rank puts through the model at a time.
            n_latents: Slots of an image; linked to the model's connector.
            image_size: Side of an image in pixels; linked to the model's tower.
            image_fit: How an image becomes square.
            val_rows: Most rows of each source for `validate`; `test` takes all there are.
            num_workers: Processes that render rows and decode images, per rank; 0: the training process itself.
            prepare_workers: Processes that make indexes and count rows.
            seed: Seed of packing and order.
            prompt: What `predict` asks about the held-out captions' images.
            instruct: Prompts with completions, and conversations; loss on the completions and answers alone.
            sources: More sources by name; the format says the kind, and `weight` the share among those of its kind; null
                takes one away that another file names.
            unit: What ratios and weights count; in every unit each row is dealt out as soon as it is due.
            ratio_stages: Ratios that hold from later optimizer steps on.
            accept_changes: Go on although ratios, weights or the list of sources differ from the checkpoint's run.
            block_documents: Documents that are shuffled among each other; blocks follow one another in a drawn order.
            run_documents: Neighbouring documents that stay in one block, so that reads stay near each other.
            blocklist: Patterns of files that name what must not be learnt: keys, URLs, hashes of images; applied as rows
                are read, without touching shards or indexes.
            quarantine: File that lists the bad samples met while training; None: quarantine.jsonl in the run's folder.
        """
        super().__init__()
        self.prepare_data_per_node = False
        self.tokenizer_config = tokenizer
        given = {"text": text, "caption": caption, "interleaved": interleaved, "instruct": instruct}
        named = name_sources(given, sources)
        self.unit, self.accept_changes = unit, accept_changes
        self.ratios = ratios_by_step(ratio, ratio_stages, self.default_ratio, named.values())
        used = [any(ratio[kind] for _, ratio in self.ratios) for kind in range(len(CORPORA))]
        self.sources = {n: s for n, s in named.items() if used[s.kind] and s.config.weight}
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
        self.opened: dict[str, PreparedSource] = {}
        self.steps = Steps.constant(global_batch_rows)
        self._loaded: Any = None  # the checkpoint whose stream goes on
        self._accumulates: L.Trainer | None = None  # the trainer whose accumulation was set

    @property
    def kinds(self) -> dict[str, int]:
        """Return the kind of each source, an index into CORPORA, by name."""
        return self.history.kinds

    # ---- preparation

    def prepare_data(self) -> None:
        """Make what is missing of tokenizer, indexes and row counts."""
        prepare_tokenizer(self.tokenizer_config, self.sources.values())
        for source in self.sources.values():
            prepare_source(source, self.tokenizer_config.path, self.prepare_workers)
        self._open_sources(self.prepare_workers)

    def _open_sources(self, workers: int) -> None:
        self.tokenizer = open_tokenizer(self.tokenizer_config)
        layout = RowLayout(
            seq_len=self.seq_len, n_latents=self.n_latents, seed=self.seed,
            block_documents=self.block_documents, run_documents=self.run_documents,
        )  # fmt: skip
        self.opened = {n: PreparedSource(s, self.tokenizer, layout, workers) for n, s in self.sources.items()}

    def open(self) -> None:
        """Open tokenizer and indexes, and find the rows of both splits.

        Raises: UserError if one is missing or was made for something else.
        """
        if not self.opened:  # the process that prepared them has them open
            self._open_sources(1)
        self._deal(self._wanted())

    def setup(self, stage: str) -> None:
        self.open()
        if self.trainer is not None and stage == "fit":
            self._set_accumulation()

    def describe(self, n_steps: int) -> str:
        """Return a table of what the sources give, and how much of it `n_steps` optimizer steps read."""
        n_rows = self.steps.row(max(0, n_steps))
        read = dict(zip(self.history.kinds, self.schedule.counts(n_rows), strict=True))
        return describe_sources(self.opened, read, n_rows, self.seq_len)

    def _set_accumulation(self) -> None:
        """Let the trainer accumulate as many micro-batches as a global batch needs.

        Raises: UserError if they do not divide, or the trainer was told otherwise.
        """
        assert self.trainer is not None
        G, m, W = self.global_batch_rows, self.micro_batch_rows, self.trainer.world_size
        wanted = micro_batches(G, m, W)
        if self.trainer is self._accumulates:
            return  # a second fit of the same trainer
        if self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but it follows from the data's "
                f"numbers: {G} rows a step on {W} ranks with micro-batches of {m} make {wanted}; leave it out"
            )
        self.trainer.accumulate_grad_batches = wanted
        self._accumulates = self.trainer
        if isinstance(self.trainer.val_check_interval, int):
            self.trainer.val_check_interval *= wanted  # Lightning counts micro-batches there

    # ---- streams

    def stream(self, split: str = "train") -> Stream:
        """Return the rows of `train` (endless) or `val` (each held-out row once, source by source)."""
        if split == "train":
            packed = [self.opened[n].train if n in self.opened else None for n in self.history.kinds]
            return Stream(packed, self.schedule, self.tokenizer.special, self.seq_len)
        return self._val_stream(None)[0]

    def apply_blocklist(self, row: Row) -> tuple[Row, dict[int, str]]:
        """Return a row as the model gets it, and what blocks the documents that the blocklist strikes out of it."""
        if self.blocklist is None:
            return row, {}
        return self.blocklist.apply(row, self.opened[row.source].corpus, self.tokenizer.special)

    def n_val_rows(self) -> int:
        """Return the rows of the `val` stream."""
        return self._val_stream(None)[1]

    def _val_stream(self, most_rows: int | None) -> tuple[Stream, int]:
        held_out = [source.val for source in self.opened.values() if source.val is not None]
        if not held_out:
            raise UserError("no corpus has held-out documents; raise val_share of a corpus")
        counts = [packed.plan.n_rows for packed in held_out]
        schedule = SequentialSchedule([min(c, most_rows) if most_rows is not None else c for c in counts])
        return Stream(held_out, schedule, self.tokenizer.special, self.seq_len), schedule.n_rows

    def _deal(self, history: History) -> None:
        self.history, self.schedule = history, build_schedule(history.phases, history.kinds)

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return about how many images and supervised tokens a micro-batch holds at most."""
        return largest_micro_batch(self.opened, self.kinds, self.schedule, self.micro_batch_rows)

    def _end_with_the_sources(self) -> None:
        """Let training end with the last whole step before a source has been read `max_epochs` times.

        Raises: UserError if that was so before the run began, or goes on.
        """
        assert self.trainer is not None
        if (end := last_step(self.opened, self.kinds, self.schedule, self.steps)) is None:
            return
        (last, why), at, loop = end, self.trainer.global_step, self.trainer.fit_loop.epoch_loop
        if last < max(1, at):
            raise UserError(f"after step {last:,} {why}, and the run is at step {at:,}; raise max_epochs")
        if loop.max_steps < 0 or last < loop.max_steps:
            rank_zero_info(f"training ends with step {last:,}, not {loop.max_steps:,}: then {why}")
            loop.max_steps = last

    # ---- loaders

    def train_dataloader(self) -> Iterable[Any]:
        """Begin with the rows of the next step.

        Raises: UserError if the trainer goes on from a checkpoint whose rows are not known.
        """
        first = 0
        if self.trainer is not None:
            path = getattr(self.trainer, "ckpt_path", None)
            if path is not None and path != self._loaded:
                raise UserError(
                    f"{path} is of a run with another kind of data than {type(self).__name__}: resume with that run's data, "
                    "or start anew from its weights with model.init_from"
                )
            self._end_with_the_sources()
            rank_zero_info(self.describe(self.trainer.max_steps))
            if self.blocklist is not None:
                rank_zero_info(f"blocklist: {len(self.blocklist):,} entries")
            first = self.steps.row(self.trainer.global_step)
        return Loader(MicroBatches(self.stream(), self._share(first), self._rendering()), self.num_workers)

    def val_dataloader(self) -> Iterable[Any]:
        return self._finite(self.val_rows)

    def test_dataloader(self) -> Iterable[Any]:
        return self._finite(None)

    def predict_dataloader(self) -> Iterable[Any]:
        """Yield questions about the images of held-out caption pairs, and the prompts of held-out examples."""
        if not any(source.val is not None for kind in ("caption", "instruct") for source in self._of_kind(kind)):
            raise UserError("predict asks about held-out caption pairs and examples, but there are none")
        return PromptLoader(lambda: chain(self.caption_prompts(), self.instruct_prompts()), self.seq_len)

    def caption_prompts(self) -> Iterator[PromptBatch]:
        """Yield questions about held-out captions' images, if there are any."""
        for source in self._of_kind("caption"):
            yield from caption_prompts_of(source.corpus, self._held_out(source), self.tokenizer, self.image_size, self.prompt)

    def instruct_prompts(self) -> Iterator[PromptBatch]:
        """Yield the prompts of held-out examples, if there are any."""
        for source in self._of_kind("instruct"):
            yield from example_prompts_of(source.corpus, self._held_out(source), self._rendering(), self.seq_len)

    def _held_out(self, source: PreparedSource) -> Iterator[int]:
        for document in source.held_out():
            if self.blocklist is None or self.blocklist.match(source.corpus, document) is None:
                yield document

    def _of_kind(self, kind: str) -> list[PreparedSource]:
        return [source for source in self.opened.values() if CORPORA[source.kind] == kind]

    def _finite(self, most_rows: int | None) -> FiniteLoader:
        stream, n_rows = self._val_stream(most_rows)
        return FiniteLoader(MicroBatches(stream, self._share(0), self._rendering(), n_rows), self.num_workers)

    def _share(self, first_row: int) -> BatchLayout:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchLayout(
            first_row=first_row, global_batch_rows=self.global_batch_rows, micro_batch_rows=self.micro_batch_rows,
            rank=rank, world_size=world,
        )  # fmt: skip

    def _ledger(self) -> Ledger | None:
        folder = Path(self.trainer.default_root_dir) if self.trainer is not None else None
        path = self.quarantine or (folder and folder / LEDGER)
        return Ledger(path) if path else None

    def _rendering(self) -> RenderOptions:
        return RenderOptions(
            tokenizer=self.tokenizer, image_size=self.image_size, fit=self.image_fit,
            n_latents=self.n_latents, max_bad_share={n: s.config.max_bad_share for n, s in self.sources.items()},
            ledger=self._ledger(), blocklist=self.blocklist, unit=self.unit,
        )  # fmt: skip

    # ---- resume: a row number, and what the rows are of

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        step = self.trainer.global_step
        return {"step": step, "next_row": self.steps.row(step), "steps": self.steps.to_list()} | self.history.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: UserError if the rows to come are not those of the checkpoint's run, unless the change is accepted."""
        assert self.trainer is not None
        if self.trainer.state.fn != "fit":
            return  # held-out rows and questions may be of any data
        if "steps" not in state_dict:
            raise UserError("the checkpoint's data stream is of an earlier version; start anew with model.init_from")
        self._loaded = getattr(self.trainer, "ckpt_path", None)
        row, size = state_dict["next_row"], state_dict["steps"][-1][2]
        for change in self._take_up(state_dict, accept=self.accept_changes):
            rank_zero_info(f"from row {row:,} on: {change}")
        if size != (now := self.global_batch_rows):
            rank_zero_info(f"from row {row:,} on: a step reads {now} rows (global_batch_rows), not {size}")

    def read_as(self, state_dict: dict[str, Any]) -> None:
        """Deal past rows out as the run of a checkpoint did, whatever this configuration's shares are."""
        self._take_up(state_dict, accept=True)

    def _take_up(self, state_dict: dict[str, Any], *, accept: bool) -> list[str]:
        self.steps = Steps.from_list(state_dict["steps"]).resume(state_dict["step"], self.global_batch_rows)
        history, changes = History.from_dict(state_dict).resume(self._wanted(), state_dict["next_row"], accept=accept)
        self._deal(history)
        return changes

    def _wanted(self) -> History:
        """Return what the configuration asks for."""
        totals = {name: source.train.plan.totals for name, source in self.opened.items()}
        sources = list(self.sources.values())
        stages = tuple(row_shares(self.steps.row(step), ratio, sources, totals, self.unit) for step, ratio in self.ratios)
        return History(self._rules(), {n: s.contents for n, s in self.opened.items()}, [Phase(0, stages)])

    def _rules(self) -> dict[str, Any]:
        names = ("seed", "seq_len", "n_latents", "image_size", "image_fit", "block_documents", "run_documents")
        return {n: getattr(self, n) for n in names} | {"tokenizer": self.tokenizer.fingerprint, "packing": VERSION}
