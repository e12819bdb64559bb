"""The verb `plan`: what a run takes and what is wrong with it, without a GPU, weights or corpora."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from datamodules.module import MixtureData
from kosmos_lit.cli.parsing import Parser
from kosmos_lit.cli.trainer import IGNORED_WARNINGS, KosmosCLI, linked_targets, user_errors
from kosmos_lit.config import KosmosConfig, OptimizerConfig, collect_errors
from kosmos_lit.errors import UserError
from kosmos_lit.preflight.devices import DEVICES, find_device
from kosmos_lit.preflight.estimates import estimate_run
from kosmos_lit.preflight.problems import find_problems
from kosmos_lit.preflight.run_description import RunDescription, devices_per_node
from kosmos_lit.preflight.table import format_plan

T = TypeVar("T")


def plan_parser() -> argparse.ArgumentParser:
    """Return the options of `plan`; those of `fit` are taken beside them."""
    parser = Parser(
        prog="main.py plan",
        description="Print what a run takes: parameters, memory of a device, time, tokens and epochs, disk; and all "
        "problems: where its configuration contradicts itself, its data or its devices. Needs no GPU, downloads nothing and "
        "prepares nothing. Exit code 0: the run can start; 1: there are problems.",
        epilog="All other arguments are those of fit: -c CONFIG, overrides. Tokens are counted in indexed corpora; before "
        "that they are estimated from typical documents. Memory is that of the fullest moment of the model's own code, run "
        "on tensors without storage; operations are counted as docs/metrics.md says. Bandwidths are nominal, "
        "and what computing can hide is what lasts no longer than the layers' own operations (docs/multi_gpu.md).",
    )
    parser.add_argument("--devices", type=_positive, default=None, help="devices of a node, instead of trainer.devices")
    parser.add_argument("--nodes", type=_positive, default=None, help="number of nodes, instead of trainer.num_nodes")
    parser.add_argument(
        "--device", default=None, metavar="NAME",
        help=f"one of {', '.join(DEVICES)}; by default h100, or this machine for a run on the CPU",
    )  # fmt: skip
    parser.add_argument("--memory", default=None, metavar="SIZE", help="of a device, such as 80GB, instead of its own")
    parser.add_argument("--peak", type=float, default=None, metavar="TFLOP/S", help="of a device, instead of its own")
    parser.add_argument("--peak-share", type=float, default=0.4, help="share of the peak that the run is assumed to reach")
    for where, group in (("node", "of the same node"), ("network", "of other nodes")):
        parser.add_argument(
            f"--{where}-gb-s", type=float, default=None, metavar="GB/S",
            help=f"bandwidth of a device to those {group}, in each direction, instead of its nominal one",
        )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the same numbers as JSON")
    return parser


def plan(arguments: list[str]) -> int:
    """Print a run's plan; return 0 if the run can start, else 1."""
    a, run_arguments = plan_parser().parse_known_args(arguments)
    run = describe_run(run_arguments, a.devices, a.nodes)
    device = find_device(
        a.device, a.memory, a.peak, a.peak_share, run.precision, on_cpu=run.on_cpu, tf32=run.tf32,
        links=(a.node_gb_s, a.network_gb_s),
    )  # fmt: skip
    estimates = estimate_run(run, device)
    problems = find_problems(run, estimates)
    if a.json:
        print(json.dumps(estimates.to_dict() | {"notes": run.notes, "problems": problems}, indent=2))
    else:
        print(format_plan(run, estimates, problems))
    return 1 if problems else 0


class PlanCLI(KosmosCLI):
    """Reads a configuration and builds nothing but, when it is called for, the data module."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(arguments, run=False)

    def refuse_linked_targets(self) -> None:
        """Accept them: a plan lists them with the other problems."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def mixture(self) -> MixtureData:
        """Return the data module of the configuration.

        Raises: UserError if there is none, or it is no mixture of corpora.
        """
        data = self.build_data()
        if not isinstance(data, MixtureData):
            raise UserError(f"plan: {type(data).__name__} has no rows to plan")
        return data


def describe_run(arguments: Sequence[str], devices: int | None = None, nodes: int | None = None) -> RunDescription:
    """Return a run's description, its corpora opened if they are indexed.

    Args:
        arguments: those of fit.
        devices: of a node, instead of the trainer's.
        nodes: instead of the trainer's.

    Raises: UserError if the configuration cannot be read; what can be read but not run is listed in `problems`.
    """
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    with user_errors(arguments):
        cli = PlanCLI(arguments)
    config, notes = cli.config, list[str]()
    problems = list(linked_targets(arguments))
    # Plain data: the dataclasses are made below, one by one, each with its own mistakes.
    model = config.as_dict()["model"]

    def attempt(make: Callable[[], T]) -> T | None:
        """Return what `make` returns; if it fails, add the reasons to `problems` and return None."""
        result: T | None = None
        with collect_errors() as mistakes:
            try:
                with user_errors(arguments):
                    result = make()
            except UserError as error:
                mistakes.append(str(error))
            except ZeroDivisionError:
                assert mistakes  # a size of 0 is collected as a mistake, and the config goes on to divide by it
        problems.extend(mistakes)
        return result

    n_before = len(problems)
    kosmos = attempt(lambda: KosmosConfig.from_dict(model["kosmos"]))
    # A config with collected mistakes is returned all the same, for other checks to use.
    is_sound = len(problems) == n_before
    # The defaults stand in for an optimizer that cannot be made.
    optimizer = attempt(lambda: OptimizerConfig.from_dict(model["optimizer"])) or OptimizerConfig()
    run = RunDescription(
        trainer=config.trainer, optimizer=optimizer, kosmos=kosmos, is_sound=is_sound, freeze=tuple(model["freeze"] or ()),
        tf32=model["tf32"],
        data=attempt(cli.mixture), devices=devices or devices_per_node(config.trainer, notes),
        nodes=nodes or int(config.trainer.num_nodes or 1), problems=problems, notes=notes,
    )  # fmt: skip
    # Last: it opens the run's corpora; `problems` is the run's list by now.
    attempt(run.open_corpora)
    return run


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)
