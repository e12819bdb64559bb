"""The LightningDataModule of instruction tuning."""

from __future__ import annotations

from typing import Any

from datamodules.config import CorpusConfig, RatioConfig
from datamodules.module import MixtureData


class InstructData(MixtureData):
    """Examples of prompts and answers and, by ratio, the corpora that the model was trained on before."""

    default_ratio = (0.0, 0.0, 0.0, 1.0)  # in the order of CORPORA

    def __init__(
        self,
        instruct: CorpusConfig,
        ratio: RatioConfig = RatioConfig(),
        **options: Any,
    ) -> None:
        """Take the examples; everything else is as in MixtureData.

        Args:
            instruct: Prompts with completions, and conversations; loss on the completions and answers alone.
            ratio: Shares in positions, by default 0 : 0 : 0 : 1; the other corpora are configured as in MixtureData.
            **options: Those of MixtureData.
        """
        # jsonargparse follows this call to learn names and types of **options.
        super().__init__(instruct=instruct, ratio=ratio, **options)
