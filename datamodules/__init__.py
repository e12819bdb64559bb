"""Corpora in, batches out: from raw files to the rows that a model trains on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.instruct import InstructData
    from datamodules.module import MixtureData
    from datamodules.world.module import WorldData

__all__ = ["InstructData", "MixtureData", "WorldData"]


def __getattr__(name: str) -> Any:
    """Import data modules when a config names them: preparing corpora needs neither torch nor Lightning."""
    if name == "InstructData":
        from datamodules.instruct import InstructData

        return InstructData
    if name == "MixtureData":
        from datamodules.module import MixtureData

        return MixtureData
    if name == "WorldData":
        from datamodules.world.module import WorldData

        return WorldData
    raise AttributeError(name)
