"""KosmosCLI: LightningCLI without its surprises.

Differences from stock, and why:

- `${...}` is resolved after all overlays and flags, so that an overlay reaches every value that refers to what it changes.
- Option names must be written out: an abbreviation could silently stand for another option.
- Values that model and data share are linked; setting a linked target is refused instead of ignored.
- The run's configuration wins over a checkpoint's; a checkpoint of another architecture is refused, naming the fields.
- `--ckpt_path last` is the newest complete checkpoint in the run's folder; a new run does not write into an old one's.
- Named sources and evaluation tasks are merged across files; the stock parser drops those that an overlay does not repeat.
- `test` with tasks (`eval`) evaluates them, and needs no corpora.
- `configs/base.yaml` is read before all other files; `-c quickstart` finds a shipped file by its name.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from omegaconf.errors import OmegaConfBaseException

from kosmos_lit.callbacks.evaluation import EvaluateTasks
from kosmos_lit.callbacks.garbage import GarbageCollection
from kosmos_lit.callbacks.loss_spikes import LossSpikes
from kosmos_lit.callbacks.signals import EndAtSignals
from kosmos_lit.callbacks.watchdog import Watchdog
from kosmos_lit.checkpoint import AtomicCheckpointIO, check_architecture, find_last, load_checkpoint
from kosmos_lit.checks.device import check_backend
from kosmos_lit.checks.launch import check_launch, check_slurm_tasks
from kosmos_lit.cli.evaluation import evaluation_data
from kosmos_lit.cli.overlays import BASE, configs_of, read_config, value_at, with_all_named, with_files_resolved
from kosmos_lit.cli.parsing import HelpfulParser
from kosmos_lit.cli.renamed import check_flags, check_names
from kosmos_lit.config import KosmosConfig
from kosmos_lit.errors import UserError
from kosmos_lit.evaluation.config import EvalConfig
from kosmos_lit.evaluation.trainer import EvaluatedLit
from kosmos_lit.init_from import check_pretrained
from kosmos_lit.interruption import Interruption
from kosmos_lit.lit import KosmosLit
from kosmos_lit.run_lock import RunLock
from kosmos_lit.sharding.fsdp import Fsdp2Strategy, check_strategy
from kosmos_lit.sharding.strategy import ShardedStrategy, check_precision
from kosmos_lit.terminal import program
from kosmos_lit.trainer_internals import end_started_ranks, leave_signals_alone, take_checkpoint_as_named
from kosmos_lit.watchdog import LAUNCHER

LINKS = {
    "model.kosmos.connector.n_latents": "data.init_args.n_latents",
    "model.kosmos.vision.image_size": "data.init_args.image_size",
}
LAST = "last"
IGNORED_WARNINGS = (
    ".*LeafSpec",  # Lightning's own use of torch
    "(?s).*(instantiate_classes|JsonargparseDeprecationWarning)",  # Lightning's own use of jsonargparse
    ".*exists and is not empty",  # the checkpoint folder of a resumed run
    "The dirpath has changed",  # a checkpoint of another run
    ".*sync_dist=True",  # what is logged has been summed over ranks
    ".*srun. command is available",  # on a machine with Slurm: a run outside a job is no mistake, one in it is checked
    ".*does not have many workers",  # `num_workers` is the config's to choose
)
"""Patterns of warnings that a user can do nothing about."""

# Interpolations start at a file's root, but the parser nests the file below the verb: relative ones survive that.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class KosmosParser(HelpfulParser, LightningArgumentParser):
    """The parser of a run's configuration."""


class SaveConfigOnce(SaveConfigCallback):
    """Saves the configuration of every start of a run: config.yaml, then config.resume-1.yaml and so on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Lightning's own file goes to the logger's folder, of which each start has another one.
        super().__init__(*args, **(kwargs | {"save_to_log_dir": False}))

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        n_starts = len(list(folder.glob("config*.yaml")))
        path = folder / (f"config.resume-{n_starts}.yaml" if n_starts else "config.yaml")
        # Nulls are written too: they may replace defaults that are no nulls.
        self.parser.save(self.config, path, skip_unset=False, overwrite=True, multifile=False)


class KosmosCLI(LightningCLI):
    """Fit, validate, test and predict by configuration."""

    lock: RunLock | None = None
    """Of the run's folder, while a run trains there."""

    def __init__(self, arguments: Sequence[str], *, run: bool = True, beside: Sequence[str] = ()) -> None:
        """Read and check the arguments, build what the verb needs and, with `run`, do what it says.

        Args:
            arguments: with `run`, the verb first.
            run: whether there is a verb.
            beside: names of options that another verb has taken, which a misspelt one may stand for.
        """
        self.arguments, self.beside = with_files_resolved(arguments), tuple(beside)
        self.interruption = Interruption()
        check_flags(self.arguments)
        for config in configs_of(self.arguments):
            check_names(read_config(config), config)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        self.refuse_linked_targets()
        self.arguments = with_all_named(self.arguments)
        kwargs: dict[str, Any] = {"parser_mode": "omegaconf+", "allow_abbrev": False, "prog": program()}
        defaults = {"default_config_files": [str(BASE)]}
        # Each verb has a parser of its own.
        per_verb = {verb: kwargs | defaults | {"prog": f"{program()} {verb}"} for verb in self.subcommands()}
        try:
            with self.interruption if run else nullcontext():
                self._start(run=run, parser_kwargs=kwargs | (per_verb if run else defaults))
        finally:
            if self.lock is not None:
                self.lock.release()
            if os.environ.get(LAUNCHER) == str(os.getpid()):
                del os.environ[LAUNCHER]  # what this process starts from here on is no rank of this run
            if hasattr(self, "trainer"):
                fails = sys.exc_info()[0] is not None and not self.interruption.is_agreed
                end_started_ranks(self.trainer, seconds=3.0 if fails else 30.0)

    def _start(self, **more: Any) -> None:
        super().__init__(
            EvaluatedLit if self.arguments[:1] == ["test"] else KosmosLit,
            L.LightningDataModule,
            save_config_callback=SaveConfigOnce,
            parser_class=KosmosParser,
            subclass_mode_data=True,
            seed_everything_default=0,
            # The model makes its optimizer itself.
            auto_configure_optimizers=False,
            # Else checkpoints hold the parsed arguments, not those that the model's constructor received.
            load_from_checkpoint_support=False,
            # Loaders yield the rows of their own rank; Lightning's sampler would divide them again.
            trainer_defaults={"use_distributed_sampler": False},
            args=self.arguments,
            **more,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the requested verb alone: building the options of the others takes longer than everything else here."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb in self.arguments[:1]}

    def refuse_linked_targets(self) -> None:
        """Raises: UserError if a flag or a file sets a value that is linked to another one."""
        for message in linked_targets(self.arguments):
            raise UserError(message)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        assert isinstance(parser, KosmosParser)
        parser.beside = self.beside
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in LINKS.items():
            parser.link_arguments(source, target)
        parser.add_class_arguments(EvalConfig, "eval")
        # Callbacks of every run, also of those whose configuration lists its own callbacks.
        parser.add_lightning_class_args(GarbageCollection, "garbage_collection")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(LossSpikes, "loss_spikes")

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint and check that it fits the configured model.

        The stock method also merges the checkpoint's hyper-parameters over the configuration, flags included.
        """
        if not (verb := self.config.get("subcommand")):
            return
        config: Namespace = self.config[verb]
        config["weights_only"] = True  # a checkpoint holds plain data; nothing in a file may run code
        path = config.get("ckpt_path")
        if path == LAST:
            folder = _checkpoint_folder(config)
            path = find_last(folder)
            if path is None and verb != "fit":
                raise UserError(f"no checkpoint in {folder}")
            print(f"loading {path}" if path else f"no checkpoint in {folder}: starting from the beginning")
            config["ckpt_path"] = str(path) if path else None
        elif path is None and verb == "fit" and not config.trainer.fast_dev_run:
            # A trial run (fast_dev_run) writes no checkpoints that could mix with older ones.
            folder = _checkpoint_folder(config)
            if any(folder.glob("*.ckpt")):
                raise UserError(
                    f"{folder} holds checkpoints of an earlier run: resume it with --ckpt_path last, choose another "
                    "--trainer.default_root_dir, or delete it"
                )
        elif path is None and verb != "fit" and not config.model.init_from:
            print(f"{verb}: no --ckpt_path, so the model is untrained")
        if path is None and config.model.init_from:
            # As for a checkpoint, before data are prepared.
            check_pretrained(config.model.init_from, KosmosConfig.from_dict(config.as_dict()["model"]["kosmos"]))
        if strays := sorted(Path(config.trainer.default_root_dir or ".").glob("hpc_ckpt_*")):
            print(f"ignored {strays[-1]}: name a file that Lightning has written under Slurm with --ckpt_path to load it")
        if path:
            # Compared now, before anything large is built or loaded.
            kosmos = KosmosConfig.from_dict(config.as_dict()["model"]["kosmos"])
            saved = KosmosConfig.from_dict(load_checkpoint(path)["hyper_parameters"]["kosmos"])
            check_architecture(saved, kosmos, path)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; for `test` with tasks the data are the tasks."""
        # A null removes a task, so a table of nulls has no tasks.
        evaluates = self.subcommand == "test" and any((self._get(self.config, "eval").tasks or {}).values())
        if evaluates and "blocklist" in (options := self._get(self.config, "data").get("init_args", {})):
            options["blocklist"] = None  # a file about corpora, which an evaluation does without
        super().instantiate_classes()
        checkpoint = self._get(self.config, "ckpt_path")
        if evaluates:
            config, run = self._get(self.config_init, "eval"), Path(self.trainer.default_root_dir)
            kosmos, weights = self.model.config, self.model.init_from
            self.datamodule = evaluation_data(config, kosmos, self.datamodule, run, checkpoint, weights)
        if checkpoint:
            # The checkpoint replaces these weights, and their file may be gone. The saved configuration still names it.
            self.model.init_from = None

    def before_fit(self) -> None:
        """Take the run's folder for this run alone. Raises: UserError if another run has it."""
        # Rank 0 writes there. A trial run (fast_dev_run) writes nothing.
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.lock = RunLock(self.trainer.default_root_dir)
            self.lock.acquire()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the checkpoint writer, unless the configuration names one, and the tasks that are run in training.

        Raises: UserError if the trainer refuses its settings, or sharded training the precision.
        """
        config = self._get(self.config_init, "trainer")
        check_strategy(config.strategy)
        if isinstance(config.strategy, ShardedStrategy):
            check_precision(config.precision, config.strategy.config_file)
        evaluation = self._get(self.config_init, "eval")
        # Lightning lets kwargs replace the configured value: it must be repeated. The same holds for plugins.
        callbacks = kwargs["callbacks"] = [*(config.get("callbacks") or [])]
        if self.subcommand == "fit" and evaluation.every_n_steps is not None:
            if not evaluation.enabled_tasks:
                raise UserError(f"eval.every_n_steps is {evaluation.every_n_steps}, but there are no eval.tasks")
            callbacks.append(EvaluateTasks(evaluation))
        if self.subcommand == "fit":
            callbacks.append(EndAtSignals(self.interruption))
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]  # Lightning also takes a single one
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        check_slurm_tasks()
        if os.environ.get(LAUNCHER) != str(os.getppid()):
            os.environ[LAUNCHER] = str(os.getpid())  # for the ranks that this process starts
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"trainer: {error}") from error
        leave_signals_alone(trainer)
        take_checkpoint_as_named(trainer)
        check_launch(trainer)
        check_backend(trainer)
        if isinstance(trainer.strategy, Fsdp2Strategy):
            # Asked now, for one message before other ranks start.
            _ = trainer.strategy.ranks_per_replica
        return trainer

    def build_data(self) -> L.LightningDataModule:
        """Return the configured data module.

        Raises: UserError if none is configured.
        """
        if "data" not in self.config or self.config.data is None:
            raise UserError("no data: pass a run's config with -c")
        data = Namespace(data=self.config.data)  # type: ignore[no-untyped-call]
        built: L.LightningDataModule = self.parser.instantiate(self.config.clone().update(data)).data
        return built


class DataCLI(KosmosCLI):
    """Reads a run's configuration and builds its data module alone: no trainer, no model."""

    def __init__(self, arguments: Sequence[str], *, beside: Sequence[str] = ()) -> None:
        super().__init__(arguments, run=False, beside=beside)

    def instantiate_classes(self) -> None:
        self.datamodule = self.build_data()


def run_trainer(arguments: Sequence[str]) -> None:
    """Run fit, validate, test or predict.

    Raises: UserError for mistakes in configuration, data or checkpoint.
    """
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    arguments = with_files_resolved(arguments)
    with user_errors(arguments):
        KosmosCLI(arguments)


@contextmanager
def user_errors(arguments: Sequence[str]) -> Iterator[None]:
    """Raise UserError in the place of what libraries raise for a user's mistake."""
    try:
        yield
    except UserError as error:
        # The parser names an unknown option, but not the file that has it.
        unknown = re.search(r"[Oo]ption '(?:[\w.]*\.)?(\w+)'", str(error))
        files = [c for c in configs_of(arguments) if unknown and _mentions(read_config(c), unknown[1])]
        if files:
            raise UserError(f"{error} (in {', '.join(files)})") from error
        raise
    except (OmegaConfBaseException, MisconfigurationException) as error:
        raise UserError(str(error)) from error
    except (ValueError, TypeError) as error:
        if cause := _user_error_behind(error):  # the parser wraps what constructors raise
            raise cause from error
        raise
    except RuntimeError as error:
        if match := re.search(r"DataLoader worker .* killed by signal: (\w+)", str(error)):
            raise UserError(
                f"a process of the data loader was killed ({match[1]}), as happens when a machine runs out of memory: lower "
                "data.num_workers or data.micro_batch_rows, and resume with --ckpt_path last"
            ) from error
        raise
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from end
        raise


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Return whether a log record is about the run; Lightning also advertises other products."""
    return "litlogger" not in record.getMessage()


def _user_error_behind(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        # Raised `from` a constructor's error, or while it was handled.
        error = error.__cause__ or error.__context__
    return error


def _checkpoint_folder(config: Namespace) -> Path:
    for callback in config.trainer.callbacks or []:
        if folder := callback.get("init_args", {}).get("dirpath"):
            return Path(folder)
    return Path(config.trainer.default_root_dir or ".") / "checkpoints"


def linked_targets(arguments: Sequence[str]) -> Iterator[str]:
    """Yield a message for each value that a flag or a file sets although it is linked to another one."""
    for source, target in LINKS.items():
        short = target.replace(".init_args", "")  # as the parser also takes it
        advice = f"it follows from {source}; set that instead"
        for argument in arguments:
            if argument.split("=")[0] in (f"--{target}", f"--{short}"):
                yield f"{argument.split('=')[0]} cannot be set: {advice}"
        for config in configs_of(arguments):
            if value_at(read_config(config), target.split(".")) is not None:
                yield f"{config}: {target} cannot be set: {advice}"


def _mentions(node: Any, key: str) -> bool:
    """Return whether a key occurs anywhere in a config file."""
    if isinstance(node, list):
        return any(_mentions(value, key) for value in node)
    return isinstance(node, dict) and (key in node or any(_mentions(value, key) for value in node.values()))
