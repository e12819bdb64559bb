"""A run as its configuration describes it: plain values, the data module, and what is wrong with them; nothing is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace

from datamodules.corpus import read_manifest
from datamodules.module import MixtureData
from kosmos_lit.cli.trainer import NOISE, KosmosCLI, linked_targets, mistakes_in
from kosmos_lit.config import KosmosConfig, OptimizerConfig, collected
from kosmos_lit.costs.memory import Strategy
from kosmos_lit.errors import UserError
from kosmos_lit.tokenizer import has_tokenizer

T = TypeVar("T")
NODE = 8
"""GPUs of a usual node, where the configuration says `all there are`."""


@dataclass
class Run:
    """What a plan needs to know of a run."""

    trainer: Namespace
    optimizer: OptimizerConfig
    kosmos: KosmosConfig | None
    """None if its table cannot be made."""
    is_sound: bool
    """Whether the table does not contradict itself: such a model can be built."""
    freeze: tuple[str, ...]
    data: MixtureData | None
    """Opened if its indexes are there; None if it cannot be made."""
    devices: int
    nodes: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def on_cpu(self) -> bool:
        return bool(self.trainer.accelerator == "cpu")

    @property
    def max_steps(self) -> int:
        return int(self.trainer.max_steps)

    @property
    def precision(self) -> str:
        """Return Lightning's name of it."""
        given = str(self.trainer.precision or "32-true")
        return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(given, given)

    @property
    def strategy(self) -> Strategy:
        """Return how the model is shared out; Lightning's own choice for several devices is DDP."""
        given = self.trainer.strategy
        name = given if isinstance(given, str) else str(given.get("class_path", "")) if given else "auto"
        if "fsdp" in name.lower() or "modelparallel" in name.lower().replace("_", ""):
            return "fsdp"
        return "ddp" if self.world_size > 1 else "one"

    @property
    def is_opened(self) -> bool:
        """Whether the corpora are at hand."""
        return self.data is not None and bool(self.data.prepared)

    @property
    def strategy_arguments(self) -> dict[str, Any]:
        given = self.trainer.strategy
        return {} if given is None or isinstance(given, str) else dict(given.get("init_args") or {})

    def callback(self, name: str) -> dict[str, Any] | None:
        """Return the arguments of a callback, by the end of its class's name."""
        for given in self.trainer.callbacks or []:
            if given.class_path.rpartition(".")[2] == name:
                return dict(given.get("init_args") or {})
        return None


class PlanCLI(KosmosCLI):
    """Reads a configuration and builds nothing; linked values that are set are for the plan to list."""

    def refuse_linked_targets(self) -> None:
        """Leave them."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def data_module(self) -> MixtureData:
        """Return the data module that the configuration names."""
        if "data" not in self.config or self.config.data is None:
            raise UserError("no data: give a run's config with -c")
        wanted = Namespace(data=self.config.data)  # type: ignore[no-untyped-call]
        data = self.parser.instantiate(self.config.clone().update(wanted)).data
        if not isinstance(data, MixtureData):
            raise UserError(f"plan: {type(data).__name__} has no rows to plan")
        return data


def read_run(arguments: Sequence[str], devices: int | None = None, nodes: int | None = None) -> Run:
    """Read a run's configuration, and open its data if it is there.

    Args:
        arguments: those of fit.
        devices: instead of the trainer's.
        nodes: instead of the trainer's.

    Raises: UserError if it cannot be read at all; what can be read but not be run is in `problems`.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    with mistakes_in(arguments):
        cli = PlanCLI(arguments, run=False)
    config, problems, notes = cli.config, list(linked_targets(arguments)), list[str]()
    plain = config.as_dict()["model"]

    def attempt(make: Callable[[], T]) -> T | None:
        made: T | None = None
        with collected() as found:
            try:
                with mistakes_in(arguments):
                    made = make()
            except UserError as error:
                found.append(str(error))
            except ZeroDivisionError:
                assert found  # a size of 0, which has been told
        problems.extend(found)
        return made

    before = len(problems)
    kosmos = attempt(lambda: KosmosConfig.from_dict(plain["kosmos"]))
    is_sound = len(problems) == before
    optimizer = attempt(lambda: OptimizerConfig.from_dict(plain["optimizer"])) or OptimizerConfig()
    data = attempt(cli.data_module)
    run = Run(
        trainer=config.trainer, optimizer=optimizer, kosmos=kosmos, is_sound=is_sound, freeze=tuple(plain["freeze"] or ()),
        data=data, devices=1, nodes=nodes or int(config.trainer.num_nodes or 1),
        problems=problems, notes=notes,
    )  # fmt: skip
    run.devices = devices or _devices(run)
    if data is not None:
        attempt(lambda: _open(data, notes))
    return run


def _devices(run: Run) -> int:
    given = run.trainer.devices
    if isinstance(given, list):
        return len(given)
    if isinstance(given, str) and "," in given:
        return len([part for part in given.split(",") if part.strip()])
    if str(given) in ("-1", "auto"):
        if run.on_cpu or str(given) == "auto":
            return 1
        run.notes.append(f"trainer.devices is {given}: taken as {NODE} a node; --devices says otherwise")
        return NODE
    return int(given)


def _open(data: MixtureData, notes: list[str]) -> None:
    """Open the corpora if all of them are prepared; nothing is prepared here."""
    missing = [s.config.index for s in data.sources.values() if read_manifest(Path(s.config.index)) is None]
    if not has_tokenizer(data.tokenizer_config.path):
        missing.append(data.tokenizer_config.path)
    if not missing:
        data.open()
        return
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    notes.append(
        f"not prepared yet: {missing[0]}{others}; tokens are those of full rows of typical documents, and epochs are unknown"
    )
