"""A run as its configuration describes it, before anything but its data module is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from datamodules.corpus import read_manifest
from datamodules.module import MixtureData
from kosmos_lit.config import KosmosConfig, OptimizerConfig
from kosmos_lit.costs.memory import Strategy
from kosmos_lit.sharding.fsdp import ranks_per_replica
from kosmos_lit.tokenizer import has_tokenizer

DEVICES_PER_NODE = 8
"""GPUs of a usual node, where the configuration says "all"."""


@dataclass
class RunDescription:
    """What a plan needs to know about a run."""

    trainer: Namespace
    optimizer: OptimizerConfig
    kosmos: KosmosConfig | None
    """None if it cannot be made."""
    is_sound: bool
    """Whether `kosmos` has no problems, so that the model can be built."""
    freeze: tuple[str, ...]
    tf32: bool
    data: MixtureData | None
    """None if it cannot be made."""
    devices: int
    """Of a node."""
    nodes: int
    problems: list[str] = field(default_factory=list)
    """Reasons why the run cannot start."""
    notes: list[str] = field(default_factory=list)
    """Assumptions that the estimates rest on."""

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
        """Return Lightning's long name of the precision."""
        precision = str(self.trainer.precision or "32-true")
        return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(precision, precision)

    @property
    def strategy_name(self) -> str:
        """Return the strategy's name, or the path of its class."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, str) else str(strategy.get("class_path", "")) if strategy else "auto"

    @property
    def strategy(self) -> Strategy:
        """Return how the model is distributed; Lightning's own choice for several devices is DDP."""
        name = self.strategy_name
        # Lightning writes both ModelParallelStrategy and model_parallel.
        if "fsdp" in name.lower() or "modelparallel" in name.lower().replace("_", ""):
            return "fsdp"
        return "ddp" if self.world_size > 1 else "one"

    @property
    def strategy_options(self) -> dict[str, Any]:
        """Return the arguments of the strategy's class."""
        strategy = self.trainer.strategy
        return {} if strategy is None or isinstance(strategy, str) else dict(strategy.get("init_args") or {})

    @property
    def ranks_per_replica(self) -> int:
        """Return how many ranks hold the model together.

        Raises: UserError if the strategy's setting does not fit the number of ranks.
        """
        if self.strategy != "fsdp":
            return 1
        return ranks_per_replica(self.strategy_options.get("shard_size"), self.devices, self.world_size)

    @property
    def has_corpora(self) -> bool:
        """Whether the corpora are indexed and open."""
        return self.data is not None and bool(self.data.prepared)

    def callback(self, class_name: str) -> dict[str, Any] | None:
        """Return the arguments of the callback of a class; None if the trainer has none."""
        for callback in self.trainer.callbacks or []:
            # By the class's name: a package may re-export it under a shorter path.
            if callback.class_path.rpartition(".")[2] == class_name:
                return dict(callback.get("init_args") or {})
        return None

    def open_corpora(self) -> None:
        """Open the corpora if all of them are indexed; else add a note. Nothing is prepared.

        Raises: UserError if an index does not fit the configuration.
        """
        if (data := self.data) is None:
            return
        missing = [s.config.index for s in data.sources.values() if read_manifest(Path(s.config.index)) is None]
        if not has_tokenizer(data.tokenizer_config.path):
            missing.append(data.tokenizer_config.path)
        if not missing:
            data.open()
            return
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        self.notes.append(
            f"not prepared yet: {missing[0]}{others}; tokens are those of full rows of typical documents, and epochs are "
            "unknown"
        )


def devices_per_node(trainer: Namespace, notes: list[str]) -> int:
    """Return how many devices of a node `trainer.devices` stands for; an assumption is added to `notes`."""
    devices = trainer.devices
    # A list of device numbers, or the same as text: "0,1".
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if str(devices) in ("-1", "auto"):
        if trainer.accelerator == "cpu" or str(devices) == "auto":
            return 1
        notes.append(f"trainer.devices is {devices}: taken as {DEVICES_PER_NODE} a node; set another number with --devices")
        return DEVICES_PER_NODE
    return int(devices)
