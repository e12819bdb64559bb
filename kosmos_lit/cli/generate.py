"""The verb `generate`: continue a prompt with images, or score continuations by their log-likelihood."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The model and its input."""

    ckpt_path: Path
    """Checkpoint or model folder."""
    prompt: str = "An image of"
    """Text to continue; <image> marks where the next image stands."""
    image: tuple[Path, ...] = ()
    """Image files, in the order of their marks."""
    score: tuple[str, ...] = ()
    """Generate nothing; print the log-likelihood in nats of each of these texts after the prompt, one JSON object a line."""
    device: str | None = None
    """Where the model runs; None: cuda if there is one, else cpu."""


def generate_parser() -> Parser:
    """Return the options of `generate`."""
    return verb_parser("generate", GenerateOptions, GenerationConfig)


def generate(arguments: list[str]) -> None:
    """Print a model's continuation of a prompt, or the log-likelihoods of given ones."""
    # Before the imports: --help and mistakes need no torch.
    options, config = generate_parser().read(arguments)
    from kosmos_lit.inference.engine import load

    engine = load(options.ckpt_path).to(_device(options.device))
    if not options.score:
        print(engine.generate(options.prompt, options.image, **asdict(config)))
        return
    for s in engine.score(options.prompt, options.score, options.image):
        row = {"text": s.text, "log_prob": s.total, "n_tokens": s.n_tokens, "mean": s.mean}
        print(json.dumps(row, ensure_ascii=False))


def _device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # The least that uses the device. AssertionError: a torch that was built without CUDA.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # The first line: CUDA's messages go on with advice.
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
