"""Initial weights of decoder and connector.

With `branch` = fc1, fc2, v_proj, out_proj, and gain g = sqrt(ln 2L) for L layers where `norm` is `sub` (Magneto,
decoder-only), 1 where it is `pre`, as torchscale has it:

| parameter            | torchscale (default)                | magneto                            |
|----------------------|-------------------------------------|------------------------------------|
| q_proj, k_proj       | U(+-1/sqrt(fan_in)), bias the same  | Xavier normal, gain 1, bias 0      |
| branch               | g U(+-1/sqrt(fan_in)), bias the same| Xavier normal, gain g, bias 0      |
| embedding            | N(0, 1/D); <pad> zero               | the same                           |
| LayerNorm            | 1, 0                                | the same                           |

torchscale scales whatever stands in weights *and* biases after PyTorch's default; its own Xavier reset is defined but not
called. The resampler's projections follow fairseq's MultiheadAttention: q, k, v Xavier uniform with gain 1/sqrt 2, out
with gain 1 and bias 0; queries N(0, 1).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.tokens import PAD

BRANCH = ("fc1", "fc2", "v_proj", "out_proj")


def init_decoder(decoder: nn.Module, config: DecoderConfig) -> None:
    """Set every parameter of a decoder in place, following the table above."""
    gain = math.sqrt(math.log(2 * config.n_layers)) if config.norm == "sub" else 1.0
    for name, module in decoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.dim**-0.5)
            if name == "embed_tokens":
                module.weight.data[PAD] = 0
        elif isinstance(module, nn.Linear):
            scale = gain if name.rsplit(".", 1)[-1] in BRANCH else 1.0
            if config.init == "magneto":
                nn.init.xavier_normal_(module.weight, gain=scale)
                nn.init.zeros_(module.bias)
            else:
                uniform_linear(module, scale)


def uniform_linear(linear: nn.Linear, scale: float = 1.0) -> None:
    """Set weight and bias to `scale` times PyTorch's default, U(+-1/sqrt(fan_in))."""
    bound = scale / math.sqrt(linear.in_features)
    parameters: list[Tensor] = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    for parameter in parameters:
        nn.init.uniform_(parameter, -bound, bound)
