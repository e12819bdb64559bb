"""Our estimates of a step's memory and operations beside those of torch's own tools, on the recipes, without a GPU.

    python -m benchmarks.costs [--recipes NAME ...] [--json FILE]

    ours           `kosmos_lit.costs.memory.estimate`; `kosmos_lit.costs.flops.ModelFlops`, with attention in full
    MemTracker     `torch.distributed._tools.mem_tracker`: peak of a second step on fake tensors, under the real engine
    FlopCounter    `torch.utils.flop_counter.FlopCounterMode`: one micro-batch on fake tensors

Both tools get the estimate's micro-batch, full rows of one document each, with the optimizer's state allocated, and the
gradients too where a step has several micro-batches. The optimizer's step itself is left out on all sides. A case that a
tool cannot run has the error that it raises.

On `gpu`, tensors are on a fake CUDA device. `cpu` is the same model on fake CPU tensors, as a stand-in without DDP.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.checks.device import describe_device
from kosmos_lit.cli.plan import describe_run
from kosmos_lit.config import KosmosConfig
from kosmos_lit.costs import memory
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.costs.memory import Setting, estimate
from kosmos_lit.model import Kosmos
from kosmos_lit.preflight.devices import Device
from kosmos_lit.preflight.estimates import estimate_run, setting_of
from kosmos_lit.terminal import table, write_line

RECIPES: dict[str, tuple[str, ...]] = {
    "tiny": ("tests/configs/tiny.yaml",),
    "quickstart": ("configs/quickstart.yaml",),
    "small_cpu": ("configs/small_cpu.yaml",),
    "single_gpu": ("configs/single_gpu.yaml",),
    "kosmos1, 8 GPUs": ("configs/kosmos1.yaml", "configs/trainer/gpus_8.yaml"),
    "kosmos1, FSDP": ("configs/kosmos1.yaml", "configs/trainer/gpus_8.yaml", "configs/trainer/fsdp.yaml"),
}
GPUS = {"kosmos1, 8 GPUs": 8, "kosmos1, FSDP": 8}
OF_CPU: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "bf16-mixed"},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"compile": True},
)
OF_GPU: tuple[dict[str, Any], ...] = (
    {},
    {"compile": False},
    {"device": "cpu", "strategy": "one"},
    {"device": "cpu", "strategy": "one", "recompute": "full"},
)
CHANGES = dict.fromkeys(RECIPES, OF_GPU) | dict.fromkeys(("tiny", "quickstart", "small_cpu"), OF_CPU)
CHANGES["kosmos1, FSDP"] = ({},)
"""What is changed in a recipe, from case to case."""


@dataclass(frozen=True)
class Case:
    """One model and step."""

    recipe: str
    config: KosmosConfig
    setting: Setting

    @property
    def is_compiled(self) -> bool:
        """Whether layers, tower and loss are compiled: by default on GPUs."""
        compiled = self.config.decoder.compile
        return self.setting.device == "cuda" if compiled is None else compiled

    def cells(self) -> tuple[str, ...]:
        """Return what names it."""
        s, d = self.setting, self.config.decoder
        compiled = "compiled" if self.is_compiled else "eager"
        return self.recipe, "gpu" if s.device == "cuda" else "cpu", s.precision, compiled, d.recompute


@dataclass(frozen=True)
class Result:
    """An amount by both; an error in place of one that cannot be had."""

    ours: float | str
    theirs: float | str

    @property
    def ratio(self) -> float | None:
        """Return ours over theirs."""
        if isinstance(self.ours, str) or isinstance(self.theirs, str) or not self.theirs:
            return None
        return self.ours / self.theirs


def cases(recipe: str) -> Iterator[Case]:
    """Yield a recipe as it stands, and with what is changed in it."""
    run = describe_run([argument for path in RECIPES[recipe] for argument in ("-c", path)], GPUS.get(recipe))
    estimates = estimate_run(run, Device("none", None, None, 1.0))
    assert run.kosmos is not None
    assert estimates.batch is not None
    setting = setting_of(run, estimates.batch, estimates.n_micro_batches or 1)
    for changes in CHANGES[recipe]:
        of_decoder = {name: value for name, value in changes.items() if name in ("recompute", "compile")}
        of_setting = {name: value for name, value in changes.items() if name not in of_decoder}
        config = replace(run.kosmos, decoder=replace(run.kosmos.decoder, **of_decoder))
        yield Case(recipe, config, replace(setting, **of_setting))


@contextmanager
def fake_step(case: Case) -> Iterator[tuple[Kosmos, KosmosBatch, Callable[[], None]]]:
    """Provide a model without storage, a micro-batch, and a function that puts it through, forward and backward."""
    setting = case.setting
    net = memory.training_model(case.config, setting)  # outside the mode, which holds weak references to what it has seen
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device=setting.device)
        if case.is_compiled:
            net.compile_blocks()
        batch = memory.dummy_batch(setting, net.config.vision.image_size)
        compute = memory.AUTOCAST.get(setting.precision)

        def run() -> None:
            with torch.autocast(setting.device, compute, enabled=compute is not None):
                loss = net.loss(batch, 1.0)[0]
            loss.backward()  # type: ignore[no-untyped-call]

        yield net, batch, run


def tracked_bytes(case: Case) -> float:
    """Return MemTracker's peak."""
    if case.setting.strategy == "fsdp":
        raise NotImplementedError("not run: shards need a process group of the run's world size")
    with fake_step(case) as (net, batch, run):
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates its state
        if case.setting.n_micro_batches == 1:
            optimizer.zero_grad()
        for parameter in net.parameters():
            if not parameter.requires_grad:  # MemTracker hooks every parameter, which raises for frozen ones
                hookless = cast(Any, parameter)
                hookless.register_hook = lambda _: RemovableHandle(OrderedDict())
                hookless.register_post_accumulate_grad_hook = hookless.register_hook
        tracker = MemTracker()
        tracker.track_external(net, optimizer, *(v for v in vars(batch).values() if isinstance(v, Tensor)))
        with tracker:
            run()
        peaks = tracker.get_tracker_snapshot("peak")
    return float(sum(sums["Total"] for device, sums in peaks.items() if device.type == case.setting.device))


def counted_flops(case: Case) -> float:
    """Return FlopCounterMode's operations of a forward and a backward pass."""
    with fake_step(case) as (_, _, run), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def attempt(measure: Callable[[Case], float], case: Case) -> float | str:
    """Return a figure of a case, or the error of a tool that cannot run it."""
    try:
        return measure(case)
    except Exception as error:  # noqa: BLE001  # whatever a tool raises is its result
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0]}"


def estimated_bytes(case: Case) -> float:
    """Return our estimate of the peak."""
    return float(estimate(case.config, case.setting).total)


def estimated_flops(case: Case) -> float:
    """Return our count of a forward and a backward pass, both halves of attention."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = memory.dummy_batch(case.setting, case.config.vision.image_size)
    work = Work.of_batch(batch, case.config.decoder.document_attention)
    return ModelFlops(case.config, case.setting.freeze).training(work).full


def compare(case: Case) -> tuple[Result, Result]:
    """Return memory and operations by both."""
    return (
        Result(attempt(estimated_bytes, case), attempt(tracked_bytes, case)),
        Result(attempt(estimated_flops, case), attempt(counted_flops, case)),
    )


def show(records: Sequence[tuple[Case, Result, Result]]) -> str:
    """Return a table, and the errors that its letters stand for."""
    errors: dict[str, str] = {}

    def cell(value: float | str, unit: float) -> str:
        if isinstance(value, str):
            return errors.setdefault(value, f"({chr(ord('a') + len(errors))})")
        return f"{value / unit:,.4g}"

    def cells(result: Result, unit: float) -> tuple[str, ...]:
        ratio = "" if result.ratio is None else f"{result.ratio:.3f}"
        return cell(result.ours, unit), cell(result.theirs, unit), ratio

    headers = (
        "recipe",
        "device",
        "precision",
        "layers",
        "recompute",
        "ours, MB",
        "MemTracker",
        "ratio",
        "ours, GFLOP",
        "FlopCounter",
        "ratio",
    )
    lines = table(headers, [(*c.cells(), *cells(b, 1e6), *cells(f, 1e9)) for c, b, f in records], "lllllr")
    return "\n".join([lines, "", *(f"{letter} {error}" for error, letter in errors.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    print(describe_device(torch.device("cpu")))
    records = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast and of torch.compile without a GPU
        for recipe in options.recipes:
            for case in cases(recipe):
                write_line(" ".join(case.cells()))
                records.append((case, *compare(case)))
    print(show(records))
    if options.json:
        plain = [{"case": c.cells(), "bytes": asdict(b), "flops": asdict(f)} for c, b, f in records]
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
