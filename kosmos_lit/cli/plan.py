"""The verb `plan`: what a run would take, without a GPU, weights or corpora."""

from __future__ import annotations

import argparse
import json

from kosmos_lit.cli.parsing import Parser


def plan_parser() -> argparse.ArgumentParser:
    """Return the options of `plan`; those of `fit` come beside them."""
    from kosmos_lit.preflight.devices import DEVICES

    parser = Parser(
        prog="main.py plan",
        description="Say what a run would take: parameters, memory a device, time, tokens and epochs, disk; and "
        "everything in its configuration that contradicts itself, its data or its devices. Needs no GPU, downloads nothing "
        "and prepares nothing. Exit code 0: the run can start; 1: there are contradictions.",
        epilog="All other arguments are those of fit: -c CONFIG, overrides. Where corpora are indexed, tokens are counted; "
        "where not, they are those of typical documents. Memory is that of the model's own code, run on tensors "
        "without storage, at its fullest moment; operations are counted as docs/metrics.md says.",
    )
    parser.add_argument("--devices", type=_positive, default=None, help="devices a node, instead of trainer.devices")
    parser.add_argument("--nodes", type=_positive, default=None, help="instead of trainer.num_nodes")
    parser.add_argument(
        "--device", default=None, metavar="NAME",
        help=f"one of {', '.join(DEVICES)}; by default h100, or this machine for a run on the CPU",
    )  # fmt: skip
    parser.add_argument("--memory", default=None, metavar="SIZE", help="of a device, instead of its own: 80GB")
    parser.add_argument("--peak", type=float, default=None, metavar="TFLOP/S", help="of a device, instead of its own: 989")
    parser.add_argument("--peak-share", type=float, default=0.4, help="of the peak that the run is taken to reach")
    parser.add_argument("--json", action="store_true", help="the same figures as JSON")
    return parser


def plan(arguments: list[str]) -> int:
    """Print a run's plan; return 0 if it can start, else 1."""
    a, rest = plan_parser().parse_known_args(arguments)
    from kosmos_lit.preflight.devices import find_device
    from kosmos_lit.preflight.estimates import estimates
    from kosmos_lit.preflight.problems import contradictions
    from kosmos_lit.preflight.run import read_run
    from kosmos_lit.preflight.table import page

    run = read_run(rest, a.devices, a.nodes)
    device = find_device(a.device, a.memory, a.peak, a.peak_share, run.precision, on_cpu=run.on_cpu)
    found = estimates(run, device)
    problems = contradictions(run, found)
    if a.json:
        print(json.dumps(found.to_dict() | {"notes": run.notes, "contradictions": problems}, indent=2))
    else:
        print(page(run, found, problems))
    return 1 if problems else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)
