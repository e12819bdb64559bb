"""The figures of a plan: what a run is made of, reads, computes, needs and leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.forecast import SourceForecast, TypicalForecast, forecast, largest_micro_batch, last_step
from kosmos_lit.batch import CORPORA
from kosmos_lit.checks.memory import remedies
from kosmos_lit.costs.flops import Flops, ModelFlops, Work
from kosmos_lit.costs.memory import Memory, MicroBatch, Setting, estimate, skeleton
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.preflight.run import Run

PARTS = ("vision", "connector", "decoder")


@dataclass(frozen=True)
class Device:
    """What the plan is for."""

    name: str
    memory: float | None
    """Bytes; None: not known."""
    peak: float | None
    """Operations a second of the run's arithmetic; None: not known."""
    share: float
    """Of the peak, which the run is taken to reach."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of one part of the model."""

    part: str
    total: int
    trained: int


@dataclass(frozen=True)
class Source:
    """What the run reads of one source."""

    name: str
    kind: str
    rows: int
    positions: int
    """That are not padding."""
    targets: int
    images: int
    epochs: float | None

    @classmethod
    def of(cls, r: SourceForecast) -> Source:
        """Take a reading apart."""
        a = r.amounts
        return cls(r.name, CORPORA[r.kind], a.rows, a.positions, a.targets, a.images, r.epochs)


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes, and those of its indexes."""

    checkpoint: int
    n_checkpoints: int
    """Most that lie there at a time: those that are kept, the last step's, and the one that is being written."""
    indexes: int | None
    """None where they are not at hand."""

    @property
    def needed(self) -> int:
        """Return what the run needs beside its data."""
        return self.checkpoint * self.n_checkpoints


@dataclass(frozen=True)
class Estimates:
    """A plan; what cannot be known is None."""

    device: Device
    world_size: int
    steps: int
    """Optimizer steps until the run ends."""
    end: str | None
    """Why that is before `max_steps`."""
    n_micro_batches: int | None
    """Of a rank in a step."""
    batch: MicroBatch | None
    parameters: list[Parameters]
    memory: Memory | None
    fitting: list[str]
    """What would fit, if `memory` does not."""
    sources: list[Source]
    exact: bool
    """Whether the sources' figures are counted, not expected."""
    flops: Flops | None
    """Of a step."""
    images_per_step: float
    disk: Disk | None

    @property
    def step_seconds(self) -> float | None:
        """Return the time of a step at the device's share of its peak."""
        if self.flops is None or self.device.peak is None:
            return None
        return self.flops.total / (self.device.share * self.device.peak * self.world_size)

    @property
    def positions_per_step(self) -> float:
        """Return the positions of a step that are not padding."""
        return sum(s.positions for s in self.sources) / max(1, self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("memory", "flops")}
        seconds = self.step_seconds
        memory = self.memory and {"parts": self.memory.parts, "total": self.memory.total, "needed": self.memory.needed}
        flops = self.flops and asdict(self.flops) | {"total": self.flops.total, "full": self.flops.full}
        tokens = {"positions_per_step": self.positions_per_step}
        times = {"step_seconds": seconds, "run_seconds": None if seconds is None else seconds * self.steps}
        return plain | {"memory_per_device": memory, "flops_per_step": flops} | tokens | times


def estimates(run: Run, device: Device) -> Estimates:
    """Work a run's figures out; problems that only show on the way are added to the run's."""
    steps, end = _steps(run)
    found, exact = _readings(run, steps)
    batch = _micro_batch(run)
    net = _skeleton(run)
    n_micro = _n_micro_batches(run)
    memory, ways = None, list[str]()
    if net is not None and batch is not None:
        assert run.kosmos is not None
        memory = estimate(run.kosmos, setting_of(run, batch, n_micro or 1))
        if device.memory is not None and not run.on_cpu and memory.needed > device.memory:
            assert run.data is not None
            rows = run.data.global_batch_rows // run.world_size
            ways = remedies(run.kosmos, setting_of(run, batch, n_micro or 1), memory.needed, device.memory, rows)
    return Estimates(
        device=device, world_size=run.world_size, steps=steps, end=end, n_micro_batches=n_micro, batch=batch,
        parameters=_parameters(net) if net is not None else [], memory=memory, fitting=ways,
        sources=[Source.of(r) for r in found], exact=exact, flops=_flops(run, found, steps) if net is not None else None,
        images_per_step=sum(r.amounts.images for r in found) / max(1, steps),
        disk=_disk(run, net, steps) if net is not None else None,
    )  # fmt: skip


def _skeleton(run: Run) -> Kosmos | None:
    if run.kosmos is None or not run.is_sound:
        return None
    try:
        return skeleton(run.kosmos, run.freeze)
    except UserError as error:
        run.problems.append(str(error))
        return None


def _steps(run: Run) -> tuple[int, str | None]:
    if run.data is not None and run.is_opened:
        end = last_step(run.data.prepared, run.data.kinds, run.data.schedule, run.data.steps)
        if end is not None and (run.max_steps < 0 or end[0] < run.max_steps):
            return end
    return max(0, run.max_steps), None


def _readings(run: Run, steps: int) -> tuple[list[SourceForecast], bool]:
    if run.data is None:
        return [], False
    n_rows = run.data.steps.row(steps)
    if run.is_opened:
        return forecast(run.data.prepared, run.data.kinds, run.data.schedule, n_rows), True
    return _expected(run).forecast(n_rows), False


def _expected(run: Run) -> TypicalForecast:
    data = run.data
    assert data is not None
    return TypicalForecast.of(data.sources, data.ratios, data.unit, data.steps, data.seq_len, data.n_latents)


def _micro_batch(run: Run) -> MicroBatch | None:
    if (data := run.data) is None:
        return None
    m = data.micro_batch_rows
    if run.is_opened:
        images, targets = largest_micro_batch(data.prepared, data.kinds, data.schedule, m)
    else:
        images, targets = _expected(run).largest_micro_batch(m)
    return MicroBatch(rows=m, seq_len=data.seq_len, n_images=images, n_targets=min(targets, m * data.seq_len))


def _n_micro_batches(run: Run) -> int | None:
    if run.data is None:
        return None
    found, left = divmod(run.data.global_batch_rows, run.data.micro_batch_rows * run.world_size)
    return None if left else found


def setting_of(run: Run, batch: MicroBatch, n_micro_batches: int) -> Setting:
    """Return what of a run decides its memory."""
    given = run.strategy_arguments
    return Setting(
        batch=batch, device="cpu" if run.on_cpu else "cuda", precision=run.precision, strategy=run.strategy,
        world_size=run.world_size, n_micro_batches=n_micro_batches, freeze=run.freeze,
        reshards=given.get("reshard_after_forward", True),
        sums_every_micro_batch=given.get("sync_every_micro_batch", True),
    )  # fmt: skip


def _parameters(net: Kosmos) -> list[Parameters]:
    return [Parameters(part, *_counts(net.get_submodule(part))) for part in PARTS]


def _counts(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _flops(run: Run, found: Iterable[SourceForecast], steps: int) -> Flops | None:
    """Return the operations of a step, documents being as long as they are on average."""
    if run.kosmos is None or run.data is None or not steps:
        return None
    in_row = run.kosmos.decoder.document_attention == "row"
    work = Work()
    for r in found:
        a, length = r.amounts, run.data.seq_len if in_row else r.document_length
        work += Work(a.positions, round(a.positions * length), a.targets, a.images)
    per_step = ModelFlops(run.kosmos, run.freeze).training(work)
    return Flops(**{part: flops / steps for part, flops in asdict(per_step).items()})


def _disk(run: Run, net: Kosmos, steps: int) -> Disk:
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    moments = sum(2 * p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    kept = run.callback("Checkpoints")
    n = 0
    if kept is not None:
        every, keep = int(kept.get("every_n_train_steps") or 1000), int(kept.get("keep") or 2)
        written = steps // every
        n = min(written, keep) + bool(steps % every) + (written > keep)
    indexes = None
    if run.data is not None and run.is_opened:
        folders = {Path(source.config.index) for source in run.data.sources.values()}
        indexes = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    return Disk(weights + moments, n, indexes)


def human_bytes(n: float) -> str:
    """Return bytes for a person."""
    return f"{n / 1e12:.1f} TB" if n >= 1e12 else f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
