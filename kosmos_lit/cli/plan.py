"""The verb `plan`: what a run takes and what is wrong with it, without a GPU, weights or corpora."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from datamodules.module import MixtureData
from kosmos_lit.cli.overlays import with_files_resolved
from kosmos_lit.cli.parsing import Parser, verb_parser
from kosmos_lit.cli.trainer import IGNORED_WARNINGS, KosmosCLI, linked_targets, user_errors
from kosmos_lit.config import KosmosConfig, OptimizerConfig, collect_errors
from kosmos_lit.errors import UserError
from kosmos_lit.init_from import check_pretrained
from kosmos_lit.preflight.devices import DEVICES, find_device
from kosmos_lit.preflight.estimates import estimate_run
from kosmos_lit.preflight.problems import find_problems
from kosmos_lit.preflight.run_description import RunDescription, devices_per_node
from kosmos_lit.preflight.table import format_plan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The devices that the run is planned for."""

    devices: int | None = None
    """Devices of a node, instead of trainer.devices."""
    nodes: int | None = None
    """Number of nodes, instead of trainer.num_nodes."""
    device: str | None = None
    """Kind of device, one of those listed below; None: h100, or this machine for a run on the CPU."""
    memory: str | None = None
    """Memory of a device, such as 80GB, instead of its own."""
    peak: float | None = None
    """Arithmetic of a device in TFLOP/s, instead of its own."""
    peak_share: float = 0.4
    """Share of the peak that the run is assumed to reach."""
    node_gb_s: float | None = None
    """Bandwidth of a device to those of the same node, in GB/s in each direction, instead of its nominal one."""
    network_gb_s: float | None = None
    """Bandwidth of a device to those of other nodes, in GB/s in each direction, instead of its nominal one."""
    json: bool = False
    """Print the same numbers as JSON."""

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"plan: --{name} must be positive, got {value}")


def plan_parser() -> Parser:
    """Return the options of `plan`; those of `fit` are taken beside them."""
    return verb_parser(
        "plan",
        PlanOptions,
        description="Print what a run takes: parameters, memory of a device, time, tokens and epochs, disk; and all "
        "problems: where its configuration contradicts itself, its data or its devices. Needs no GPU, downloads nothing and "
        "prepares nothing. Exit code 0: the run can start; 1: there are problems.",
        epilog="All other arguments are those of fit: -c CONFIG, overrides. Tokens are counted in indexed corpora; before "
        "that they are estimated from typical documents. Memory is that of the fullest moment of the model's own code, run "
        "on tensors without storage; operations are counted as docs/metrics.md says. Bandwidths are nominal, and what "
        "computing can hide is what lasts no longer than the layers' own operations (docs/multi_gpu.md). Devices: "
        f"{', '.join(DEVICES)}.",
    )


def plan(arguments: list[str]) -> int:
    """Print a run's plan; return 0 if the run can start, else 1."""
    parser = plan_parser()
    a, run_arguments = parser.read_known(arguments)
    run = describe_run(run_arguments, a.devices, a.nodes, beside=parser.option_names())
    device = find_device(
        a.device,
        a.memory,
        a.peak,
        a.peak_share,
        run.precision,
        on_cpu=run.on_cpu,
        tf32=run.tf32,
        links=(a.node_gb_s, a.network_gb_s),
    )
    estimates = estimate_run(run, device)
    problems = find_problems(run, estimates)
    if a.json:
        print(json.dumps(estimates.to_dict() | {"notes": run.notes, "problems": problems}, indent=2))
    else:
        print(format_plan(run, estimates, problems))
    return 1 if problems else 0


class PlanCLI(KosmosCLI):
    """Reads a configuration and builds nothing but, when it is called for, the data module."""

    def __init__(self, arguments: Sequence[str], *, beside: Sequence[str] = ()) -> None:
        super().__init__(arguments, run=False, beside=beside)

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


def describe_run(
    arguments: Sequence[str], devices: int | None = None, nodes: int | None = None, *, beside: Sequence[str] = ()
) -> RunDescription:
    """Return a run's description, its corpora opened if they are indexed.

    Args:
        arguments: those of fit.
        devices: of a node, instead of the trainer's.
        nodes: instead of the trainer's.
        beside: names of other options, which a misspelt one may stand for.

    Raises: UserError if the configuration cannot be read; what can be read but not run is listed in `problems`.
    """
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    arguments = with_files_resolved(arguments)
    with user_errors(arguments):
        cli = PlanCLI(arguments, beside=beside)
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
    if (weights := model["init_from"]) and not Path(weights).exists():
        notes.append(f"model.init_from: {weights} is not there yet; `import` makes it")
    elif weights and kosmos is not None and is_sound:
        attempt(lambda: check_pretrained(weights, kosmos))
    # The defaults stand in for an optimizer that cannot be made.
    optimizer = attempt(lambda: OptimizerConfig.from_dict(model["optimizer"])) or OptimizerConfig()
    run = RunDescription(
        trainer=config.trainer,
        optimizer=optimizer,
        kosmos=kosmos,
        is_sound=is_sound,
        freeze=tuple(model["freeze"] or ()),
        tf32=model["tf32"],
        data=attempt(cli.mixture),
        devices=devices or devices_per_node(config.trainer, notes),
        nodes=nodes or int(config.trainer.num_nodes or 1),
        problems=problems,
        notes=notes,
    )
    # Last: it opens the run's corpora; `problems` is the run's list by now.
    attempt(run.open_corpora)
    return run
