"""Initial weights of the decoder.

`branch` = fc1, fc2, v_proj, out_proj; g is their gain, the config's `branch_gain` or the default of the norm with L layers:

| norm      | g            | source                                                                    |
|-----------|--------------|---------------------------------------------------------------------------|
| sub       | sqrt(ln 2L)  | Magneto, decoder-only (arXiv 2210.06423, section 2; torchscale `subln`)   |
| deepnorm  | (8L)^(-1/4)  | DeepNet, decoder-only (arXiv 2203.00555, section 2; torchscale `deepnorm`)|
| pre, post | 1            | torchscale scales where `subln` or `deepnorm` is on, and nowhere else     |

| parameter      | torchscale (default)                 | magneto                       | gpt2                      |
|----------------|--------------------------------------|-------------------------------|---------------------------|
| q_proj, k_proj | U(+-1/sqrt(fan_in)), bias the same   | Xavier normal, gain 1, bias 0 | N(0, 0.02), bias 0        |
| fc1, v_proj    | g U(+-1/sqrt(fan_in)), bias the same | Xavier normal, gain g, bias 0 | N(0, 0.02), bias 0        |
| fc2, out_proj  | the same                             | the same                      | N(0, 0.02/sqrt(2L)), 0    |
| embeddings     | N(0, 1/D); <pad> zero                | the same                      | N(0, 0.02); <pad> zero    |
| LayerNorm      | 1, 0                                 | the same                      | the same                  |

torchscale multiplies PyTorch's default weights *and* biases by the gain; its own Xavier reset is defined but not called.
With `deepnorm`, `magneto` is DeepNet's own recipe.

gpt2 is GPT-2's (section 2.3 of its report: residual layers scaled by 1/sqrt(their number), here 2L); it has its own rule for
depth, so g is left out. The embedding's factor sqrt(D) belongs to what the decoder computes and stays, unlike in GPT-2:
tokens enter with a standard deviation of 0.02 sqrt(D), 0.9 at D = 2048, instead of 0.02. The tied output matrix gets no such
factor, so the first logits have the same spread of about 0.02 sqrt(D) as GPT-2's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kosmos_lit.config import DecoderConfig
from kosmos_lit.tokenizer import PAD

BRANCH = ("fc1", "fc2", "v_proj", "out_proj")
BRANCH_END = ("fc2", "out_proj")
"""The last matrix of each residual branch."""
GPT2_STD = 0.02


@contextmanager
def drawn_on_cpu(seed: int) -> Iterator[None]:
    """Create tensors on the CPU, whatever the default device, drawn from `seed`; the caller's draws stay as they were.

    A GPU's generator draws other numbers from a seed than the CPU's. Lightning makes the GPU the default device while it
    builds a model under some strategies, and not under others.
    """
    # No `devices`: by default fork_rng would start a context on every GPU of the machine. Seeded by the CPU's generator, as
    # torch.manual_seed would seed theirs too.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def init_decoder(decoder: nn.Module, config: DecoderConfig) -> None:
    """Set every parameter of a decoder in place, following the table above."""
    gain = branch_gain(config)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=embedding_std(config))
            # A table of learned positions has no row for padding.
            if name == "embed_tokens":
                module.weight.data[PAD] = 0
        elif isinstance(module, nn.Linear):
            kind = name.rsplit(".", 1)[-1]  # the matrix's name within its layer
            scale = gain if kind in BRANCH else 1.0
            match config.init:
                case "torchscale":
                    uniform_linear(module, scale)
                case "magneto":
                    nn.init.xavier_normal_(module.weight, gain=scale)
                    nn.init.zeros_(module.bias)
                case "gpt2":
                    depth = math.sqrt(2 * config.n_layers) if kind in BRANCH_END else 1.0
                    nn.init.normal_(module.weight, std=GPT2_STD / depth)
                    nn.init.zeros_(module.bias)


def embedding_std(config: DecoderConfig) -> float:
    """Return the standard deviation of the initial embeddings."""
    return GPT2_STD if config.init == "gpt2" else config.dim**-0.5


def branch_gain(config: DecoderConfig) -> float:
    """Return g, the gain of the initial weights of the residual branches."""
    if config.branch_gain is not None:
        return config.branch_gain
    match config.norm:
        case "sub":
            return math.sqrt(math.log(2 * config.n_layers))
        case "deepnorm":
            return math.pow(8 * config.n_layers, -0.25)
        case "pre" | "post":
            return 1.0


def uniform_linear(linear: nn.Linear, scale: float = 1.0) -> None:
    """Set weight and bias to `scale` times PyTorch's default, U(+-1/sqrt(fan_in))."""
    bound = scale / math.sqrt(linear.in_features)
    parameters: list[Tensor] = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    for parameter in parameters:
        nn.init.uniform_(parameter, -bound, bound)
