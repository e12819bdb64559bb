"""The verb `generate`: continue a prompt with images, or score continuations by their log-likelihood."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kosmos_lit.cli.parsing import Parser
from kosmos_lit.errors import UserError


def generate_parser() -> argparse.ArgumentParser:
    """Return the options of `generate`."""
    from kosmos_lit.inference.config import BEAM_STOPS, GenerationConfig

    parser, c = Parser(prog="main.py generate"), GenerationConfig()
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--prompt", default="An image of", help="<image> marks where the next image stands")
    parser.add_argument(
        "--image", type=Path, nargs="+", action="extend", default=[], help="image files, in the order of their marks"
    )
    parser.add_argument("--max-new-tokens", type=int, default=c.max_new_tokens)
    parser.add_argument("--beams", type=int, default=c.n_beams, help="1: greedy")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=c.length_penalty,
        help="beams are ranked by log probability / length ** penalty",
    )
    parser.add_argument("--beam-stop", choices=BEAM_STOPS, default=c.beam_stop, help="when beam search ends")
    parser.add_argument("--temperature", type=float, default=c.temperature, help="above 0: sample tokens")
    parser.add_argument("--top-k", type=int, default=c.top_k, help="sample among so many of the likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=c.top_p, help="sample among the likeliest tokens that together have this probability"
    )
    parser.add_argument("--seed", type=int, default=c.seed, help="of the samples")
    parser.add_argument("--repetition-penalty", type=float, default=c.repetition_penalty, help="1: none")
    parser.add_argument(
        "--no-repeat-ngram", type=int, default=c.no_repeat_ngram_size, help="never repeat a sequence of so many tokens"
    )
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before any of these")
    parser.add_argument("--choices", nargs="+", action="extend", default=[], metavar="TEXT", help="generate one of these")
    parser.add_argument(
        "--score", nargs="+", action="extend", default=[], metavar="TEXT",
        help="generate nothing; print the log-likelihood of each of these after the prompt, one JSON object a line",
    )  # fmt: skip
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    return parser


def generate(arguments: list[str]) -> None:
    """Print a model's continuation of a prompt, or the log-likelihoods of given ones."""
    # Before the imports: --help and mistakes need no torch.
    a = generate_parser().parse_args(arguments)
    from kosmos_lit.inference.config import GenerationConfig
    from kosmos_lit.inference.engine import load

    settings = {
        "max_new_tokens": a.max_new_tokens, "n_beams": a.beams, "length_penalty": a.length_penalty, "beam_stop": a.beam_stop,
        "temperature": a.temperature, "top_k": a.top_k, "top_p": a.top_p, "repetition_penalty": a.repetition_penalty,
        "no_repeat_ngram_size": a.no_repeat_ngram, "stop": a.stop, "choices": a.choices, "seed": a.seed,
    }  # fmt: skip
    GenerationConfig.from_dict(settings)  # refuses a mistake before the model is loaded
    engine = load(a.ckpt_path).to(_device(a.device))
    if not a.score:
        print(engine.generate(a.prompt, a.image, **settings))
        return
    for s in engine.score(a.prompt, a.score, a.image):
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
