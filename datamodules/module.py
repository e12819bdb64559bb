"""The LightningDataModule that mixes text, caption, interleaved and instruct corpora: it wires the chain, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.config import CorpusConfig, RatioConfig, TokenizerConfig
from datamodules.corpus import IndexedCorpus, read_manifest
from datamodules.hashing import hash_key
from datamodules.loader import FiniteLoader, Loader, MicroBatches, Questions, Rendering, Share
from datamodules.mixture import Mixture
from datamodules.plan import make_plan, split_corpus
from datamodules.prepare.files import matches
from datamodules.prepare.index import check_same, identify, prepare_corpus
from datamodules.prepare.report import describe
from datamodules.prepare.tokenizer import train_tokenizer
from datamodules.questions import ask_captions, ask_examples
from datamodules.stream import InOrder, Stream
from kosmos_lit.batch import CORPORA, PromptBatch
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit
from kosmos_lit.tokens import Tokenizer, has_tokenizer


class Batches(Protocol):
    """What a loader is to Lightning."""

    def __iter__(self) -> Iterator[Any]: ...


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
    ) -> None:
        """Take the corpora and how to mix them.

        Args:
            tokenizer: The tokenizer of all corpora.
            text: Documents of text.
            caption: Pairs of a picture and its caption.
            interleaved: Pages of text and pictures.
            ratio: Shares of the corpora, by default 5 : 5 : 2 : 0 of those that are given; one with share 0 is not opened.
            seq_len: Positions in a row.
            global_batch_rows: Rows of one optimizer step, over all ranks and micro-batches.
            micro_batch_rows: Rows that one rank puts through the model at a time.
            n_latents: Slots of a picture; linked to the model's connector.
            image_size: Side of a picture in pixels; linked to the model's tower.
            image_fit: How a picture becomes square.
            val_rows: Most rows of each corpus for `validate`; `test` takes all there are.
            num_workers: Processes that render rows and decode pictures, per rank; 0: the training process itself.
            prepare_workers: Processes that make indexes.
            seed: Seed of packing and order.
            prompt: What `predict` asks about the held-out captions' pictures.
            instruct: Prompts with completions, and conversations; loss on the completions and answers alone.
        """
        super().__init__()
        self.prepare_data_per_node = False
        self.tokenizer_config = tokenizer
        given = {"text": text, "caption": caption, "interleaved": interleaved, "instruct": instruct}
        self.ratio = ratio.weights(self.default_ratio, [given[name] is not None for name in CORPORA])
        if not any(self.ratio):
            there = ", ".join(name for name in CORPORA if given[name] is not None) or "no corpus"
            raise UserError(
                f"data.ratio: at least one weight must be positive, got {list(self.ratio)}, and {there} given; "
                "give a corpus and its share"
            )
        self.mixture = Mixture(self.ratio)
        self.configs: dict[str, CorpusConfig] = {}
        for name, weight in zip(CORPORA, self.ratio, strict=True):
            config = given[name]
            if weight and config is None:
                raise UserError(f"data.ratio.{name} is {weight:g}, but data.{name} is not given; give it, or set 0")
            if weight and config is not None:
                self.configs[name] = config
        sizes = {"seq_len": seq_len, "global_batch_rows": global_batch_rows, "micro_batch_rows": micro_batch_rows}
        for name, value in sizes.items():
            if value <= 0:
                raise UserError(f"data.{name} must be positive, got {value}")
        self.seq_len, self.global_batch_rows, self.micro_batch_rows = seq_len, global_batch_rows, micro_batch_rows
        self.n_latents, self.image_size, self.image_fit = n_latents, image_size, image_fit
        self.val_rows, self.num_workers, self.prepare_workers = val_rows, num_workers, prepare_workers
        self.seed, self.prompt = seed, prompt
        self._first_row = self._first_step = 0
        self._accumulates: L.Trainer | None = None  # the trainer whose accumulation was set

    # ---- preparation

    def prepare_data(self) -> None:
        """Make the tokenizer and the indexes that are missing."""
        c = self.tokenizer_config
        if not has_tokenizer(c.path) and c.vocab_size:
            inputs = c.input or [p for n, config in self.configs.items() if n != "instruct" for p in config.input]
            rank_zero_info(f"training a tokenizer of {c.vocab_size} pieces in {c.path}")
            train_tokenizer(inputs, c.vocab_size, Path(c.path))
        for config in self.configs.values():
            if read_manifest(Path(config.index)) is None:
                corpus = prepare_corpus(
                    format=config.format,
                    inputs=[*config.input, *(config.val_input or ())],
                    tokenizer=Path(c.path),
                    output=Path(config.index),
                    options=config.read,
                    workers=self.prepare_workers,
                    max_bad_share=config.max_bad_share,
                )
                rank_zero_info(describe(corpus))
            IndexedCorpus(config.index).check_pictures()

    def open(self) -> None:
        """Open tokenizer and indexes, and pack the rows of both splits.

        Raises: UserError if one is missing or was made for something else.
        """
        self.tokenizer = Tokenizer.load(self.tokenizer_config.path)
        wanted = self.tokenizer_config.vocab_size
        if wanted not in (None, self.tokenizer.n_pieces):
            raise UserError(
                f"the tokenizer in {self.tokenizer_config.path} has {self.tokenizer.n_pieces} pieces, but the config's "
                f"vocab_size for it is {wanted}; set that to {self.tokenizer.n_pieces}, or choose another folder"
            )
        self.corpora = {name: IndexedCorpus(c.index, self.tokenizer) for name, c in self.configs.items()}
        for config in self.configs.values():
            folder = Path(config.index)
            files = matches([*config.input, *(config.val_input or ())])  # an index may be used where its raw text is not
            check_same(folder, identify(config.format, self.tokenizer, config.read, files, folder), shards=bool(files))
        splits = {
            n: split_corpus(c, self.configs[n].val_share, self.configs[n].val_input) for n, c in self.corpora.items()
        }
        self.train_plans, self.val_plans = {}, {}
        for name, (train, val) in splits.items():
            self.train_plans[name] = make_plan(self.corpora[name], train, self.seq_len, self.n_latents, self.seed)
            if len(val):
                self.val_plans[name] = make_plan(self.corpora[name], val, self.seq_len, self.n_latents, 0)
        self.val_documents = {name: val for name, (_, val) in splits.items()}
        for name, plans in (("train", self.train_plans), ("val", self.val_plans)):
            for corpus, plan in plans.items():
                if len(plan.too_long):
                    shard, first = self.corpora[corpus].shard_and_name(int(plan.too_long[0]))
                    rank_zero_info(
                        f"{corpus}: {len(plan.too_long)} {name} examples are longer than {self.seq_len} positions and left "
                        f"out; the first: {shard}, {first}. Raise data.seq_len to keep them"
                    )

    def setup(self, stage: str) -> None:
        self.open()
        if self.trainer is not None and stage == "fit":
            self._set_accumulation()
            rank_zero_info(self.describe(self.trainer.max_steps))

    def describe(self, n_steps: int) -> str:
        """Return a table of what the corpora give, and how much of it `n_steps` optimizer steps read."""
        heads = ("corpus", "documents", "pictures", "rows", "padding", "share", "epochs")
        lines = [f"{heads[0]:<14}" + "".join(f"{h:>12}" for h in heads[1:])]
        for name, read in zip(CORPORA, self.mixture.counts(max(0, n_steps) * self.global_batch_rows), strict=True):
            if plan := self.train_plans.get(name):
                padding = 1 - plan.row_positions.mean() / self.seq_len
                share = self.ratio[CORPORA.index(name)] / sum(self.ratio)
                n_documents, n_images = len(np.unique(plan.document)), int(plan.n_images.sum())
                lines.append(
                    f"{name:<14}{n_documents:>12,}{n_images:>12,}{plan.n_rows:>12,}{padding:>12.2%}{share:>12.1%}"
                    f"{read / plan.n_rows:>12.2f}"
                )
        return "\n".join(lines)

    def _set_accumulation(self) -> None:
        """Let the trainer accumulate as many micro-batches as a global batch needs.

        Raises: UserError if they do not divide, or the trainer was told otherwise.
        """
        assert self.trainer is not None
        G, m, W = self.global_batch_rows, self.micro_batch_rows, self.trainer.world_size
        if G % (m * W):
            fits = [d for d in range(1, G // W + 1) if G % (d * W) == 0]
            advice = f"micro_batch_rows could be {', '.join(map(str, fits))}" if fits else f"use a multiple of {W} rows"
            raise UserError(f"global_batch_rows {G} is not divisible by {W} ranks x {m} micro_batch_rows; {advice}")
        wanted = G // (m * W)
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
        """Return the rows of `train` (endless) or `val` (each held-out row once, corpus by corpus)."""
        if split == "train":
            return Stream(self.corpora, self.train_plans, self.mixture, self.tokenizer.special, self.seq_len, self.seed)
        return self._val_stream(None)[0]

    def n_val_rows(self) -> int:
        """Return the rows of the `val` stream."""
        return self._val_stream(None)[1]

    def _val_stream(self, most_rows: int | None) -> tuple[Stream, int]:
        if not self.val_plans:
            raise UserError("no corpus has held-out documents; raise val_share of a corpus")
        counts = [self.val_plans[n].n_rows if n in self.val_plans else 0 for n in CORPORA]
        schedule = InOrder([min(c, most_rows) if most_rows is not None else c for c in counts])
        stream = Stream(
            self.corpora, self.val_plans, schedule, self.tokenizer.special, self.seq_len, self.seed, shuffle=False
        )
        return stream, schedule.n_rows

    # ---- loaders

    def train_dataloader(self) -> Batches:
        return Loader(MicroBatches(self.stream(), self._share(self._first_row), self._rendering()), self.num_workers)

    def val_dataloader(self) -> Batches:
        return self._finite(self.val_rows)

    def test_dataloader(self) -> Batches:
        return self._finite(None)

    def predict_dataloader(self) -> Batches:
        """Yield questions about the pictures of held-out caption pairs, and the prompts of held-out examples."""
        if not any(len(self.val_documents.get(name, ())) for name in ("caption", "instruct")):
            raise UserError("predict asks about held-out caption pairs and examples, but there are none")
        return Questions(lambda: chain(self.caption_questions(), self.instruct_questions()), self.seq_len)

    def caption_questions(self) -> Iterator[PromptBatch]:
        """Yield questions about held-out captions' pictures, if there are any."""
        if "caption" in self.configs:
            yield from ask_captions(
                self.corpora["caption"], self.val_documents["caption"], self.tokenizer, self.image_size, self.prompt
            )

    def instruct_questions(self) -> Iterator[PromptBatch]:
        """Yield the prompts of held-out examples, if there are any."""
        if "instruct" in self.configs:
            documents = self.val_documents["instruct"]
            yield from ask_examples(self.corpora["instruct"], documents, self._rendering(), self.seq_len)

    def _finite(self, most_rows: int | None) -> FiniteLoader:
        stream, n_rows = self._val_stream(most_rows)
        return FiniteLoader(MicroBatches(stream, self._share(0), self._rendering(), n_rows), self.num_workers)

    def _share(self, first_row: int) -> Share:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Share(
            first_row=first_row, global_batch_rows=self.global_batch_rows, micro_batch_rows=self.micro_batch_rows,
            rank=rank, world_size=world,
        )  # fmt: skip

    def _rendering(self) -> Rendering:
        return Rendering(
            tokenizer=self.tokenizer, image_size=self.image_size, fit=self.image_fit,
            n_latents=self.n_latents, max_bad_share=max(c.max_bad_share for c in self.configs.values()),
        )  # fmt: skip

    # ---- resume: a row number, and what the rows are of

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        steps = self.trainer.global_step - self._first_step
        return {
            "next_row": self._first_row + steps * self.global_batch_rows,
            "step": self.trainer.global_step,
            "global_batch_rows": self.global_batch_rows,
            "stream": self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: UserError if the rows to come are not the rows that the checkpoint's run would have read."""
        there, here = state_dict["stream"], self._identity()
        if wrong := [f"{k} was {there.get(k)!r}, is {here[k]!r}" for k in here if there.get(k) != here[k]]:
            raise UserError(f"the checkpoint's data stream was another one: {'; '.join(wrong)}; resume with that run's data")
        self._first_row, self._first_step = state_dict["next_row"], state_dict["step"]
        if (before := state_dict["global_batch_rows"]) != self.global_batch_rows:
            rank_zero_info(f"global_batch_rows was {before}, is {self.global_batch_rows} from row {self._first_row} on")

    def _identity(self) -> dict[str, Any]:
        """Return what the stream is a function of, as plain data."""
        names = ("seed", "seq_len", "n_latents", "image_size", "image_fit")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found["ratio"] = list(self.ratio if self.ratio[3] else self.ratio[:3])  # as before there was a fourth corpus
        found["tokenizer"] = self.tokenizer.fingerprint
        for name, corpus in self.corpora.items():
            assert corpus.manifest is not None
            found[name] = [corpus.manifest[k] for k in ("documents", "tokens", "images")]
            found[f"{name}.shards"] = f"{hash_key(json.dumps(corpus.shards_key)):016x}"
            found[f"{name}.val_share"] = self.configs[name].val_share
            if self.configs[name].val_input is not None:
                found[f"{name}.val_documents"] = len(self.val_documents[name])
        return found
