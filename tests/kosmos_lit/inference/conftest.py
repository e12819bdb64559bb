"""What the tests of generation share."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from kosmos_lit.config import Positions
from kosmos_lit.model import Kosmos
from tests.kosmos_lit.tiny_kosmos import tiny_model

POSITIONS = get_args(Positions)


@pytest.fixture
def talker(kosmos_tower: str) -> Any:
    """Make models whose layers outweigh the last token's own embedding; tied as it is, that only repeats itself."""

    def make(seed: int = 0, **fields: Any) -> Kosmos:
        model = tiny_model(kosmos_tower, seed, **fields)
        with torch.no_grad():
            for layer in model.decoder.layers:
                assert isinstance(layer.self_attn.out_proj, nn.Linear)
                layer.self_attn.out_proj.weight *= 9
                layer.ffn.fc2.weight *= 9
        return model

    return make
