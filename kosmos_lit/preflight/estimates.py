"""Estimates of a run: parameters, data read, operations, time, memory and disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from datamodules.forecast import SourceForecast, TypicalForecast, forecast, largest_micro_batch, last_step
from kosmos_lit.batch import CORPORA
from kosmos_lit.checks.memory import remedies
from kosmos_lit.costs.communication import Communication, Links, Sizes, communication
from kosmos_lit.costs.flops import Flops, ModelFlops, Work
from kosmos_lit.costs.memory import EstimateError, Memory, MicroBatch, Setting, estimate, meta_model
from kosmos_lit.errors import UserError
from kosmos_lit.model import Kosmos
from kosmos_lit.preflight.devices import Device
from kosmos_lit.preflight.run_description import RunDescription

PARTS = ("vision", "connector", "decoder")


@dataclass(frozen=True)
class Parameters:
    """Parameters of one part of the model."""

    part: str
    total: int
    trained: int


@dataclass(frozen=True)
class Source:
    """How much of one source the run reads."""

    name: str
    kind: str
    rows: int
    positions: int
    """Without padding."""
    targets: int
    images: int
    epochs: float | None

    @classmethod
    def of(cls, f: SourceForecast) -> Source:
        """Flatten a forecast."""
        a = f.amounts
        return cls(f.name, CORPORA[f.kind], a.rows, a.positions, a.targets, a.images, f.epochs)


@dataclass(frozen=True)
class Disk:
    """Disk space in bytes."""

    checkpoint: int
    n_checkpoints: int
    """Largest number at a time: those that are kept, the last step's, and the one that is being written."""
    indexes: int | None
    """None if the corpora are not indexed yet."""

    @property
    def needed(self) -> int:
        """Return the size of all checkpoints together, at most."""
        return self.checkpoint * self.n_checkpoints


@dataclass(frozen=True)
class Estimates:
    """What a run takes; None stands for what is unknown."""

    device: Device
    world_size: int
    steps: int
    """Optimizer steps of the run."""
    end: str | None
    """Why the run ends before `max_steps`; None if it does not."""
    n_micro_batches: int | None
    """Of each rank in a step; None if the rows do not divide."""
    batch: MicroBatch | None
    """The largest micro-batch."""
    parameters: list[Parameters]
    memory: Memory | None
    """Of each device."""
    fitting: list[str]
    """Changes that would make a step fit, if `memory` does not."""
    sources: list[Source]
    exact: bool
    """Whether the numbers of `sources` are counted in indexed corpora; else they are those of typical documents."""
    flops: Flops | None
    """Of a step."""
    fp8: bool
    """Whether the decoder's matrices train in 8 bits."""
    communication: Communication | None
    """Of each device in a step; None for one device, or if a bandwidth or the time of a step is unknown."""
    images_per_step: float
    disk: Disk | None

    @property
    def step_seconds(self) -> float | None:
        """Return the time of a step at the assumed share of the peak; None if the peak is unknown."""
        flops, device = self.flops, self.device
        if flops is None or device.peak is None:
            return None
        at_peak = flops.blocks / device.peak_of_blocks(self.fp8) + (flops.total - flops.blocks) / device.peak
        return at_peak / (device.share * self.world_size)

    @property
    def positions_per_step(self) -> float:
        """Return the mean number of positions in a step, without padding."""
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


def estimate_run(run: RunDescription, device: Device) -> Estimates:
    """Return the estimates of a run; problems that are met on the way are appended to `run.problems`."""
    steps, end = _steps(run)
    forecasts, exact = _forecasts(run, steps)
    batch = _micro_batch(run)
    net = _skeleton(run)  # on the meta device: no storage
    n_micro = _n_micro_batches(run)
    memory, changes = None, list[str]()
    # Memory needs a model that can be built, and data that can be made.
    if net is not None and batch is not None:
        assert run.kosmos is not None
        try:
            # `or 1`: rows that do not divide are a problem of their own, and memory is estimated all the same.
            memory = estimate(run.kosmos, setting_of(run, batch, n_micro or 1))
        except EstimateError as error:
            run.notes.append(str(error))  # a plan is of use without its memory
        if memory is not None and device.memory is not None and not run.on_cpu and memory.needed > device.memory:
            assert run.data is not None
            rows = run.data.global_batch_rows // run.world_size
            changes = remedies(run.kosmos, setting_of(run, batch, n_micro or 1), memory.needed, device.memory, rows)
    flops = _flops(run, forecasts, steps) if net is not None else None
    return Estimates(
        device=device,
        world_size=run.world_size,
        steps=steps,
        end=end,
        n_micro_batches=n_micro,
        batch=batch,
        parameters=_parameters(net) if net is not None else [],
        memory=memory,
        fitting=changes,
        sources=[Source.of(f) for f in forecasts],
        exact=exact,
        flops=flops,
        communication=_communication(run, device, net, batch, n_micro or 1, flops),
        fp8=_is_fp8(run),
        images_per_step=sum(f.amounts.images for f in forecasts) / max(1, steps),
        disk=_disk(run, net, steps) if net is not None else None,
    )


def _skeleton(run: RunDescription) -> Kosmos | None:
    if run.kosmos is None or not run.is_sound:
        return None
    try:
        return meta_model(run.kosmos, run.freeze)
    except UserError as error:
        run.problems.append(str(error))
        return None


def _steps(run: RunDescription) -> tuple[int, str | None]:
    if run.data is not None and run.has_corpora:
        end = last_step(run.data.prepared, run.data.kinds, run.data.schedule, run.data.steps)
        if end is not None and (run.max_steps < 0 or end[0] < run.max_steps):  # -1: no limit
            return end
    return max(0, run.max_steps), None


def _forecasts(run: RunDescription, steps: int) -> tuple[list[SourceForecast], bool]:
    if run.data is None:
        return [], False
    n_rows = run.data.steps.row(steps)
    if run.has_corpora:
        return forecast(run.data.prepared, run.data.kinds, run.data.schedule, n_rows), True
    return _typical(run).forecast(n_rows), False


def _typical(run: RunDescription) -> TypicalForecast:
    data = run.data
    assert data is not None
    return TypicalForecast.of(data.sources, data.ratios, data.unit, data.steps, data.seq_len, data.n_latents)


def _micro_batch(run: RunDescription) -> MicroBatch | None:
    if (data := run.data) is None:
        return None
    m = data.micro_batch_rows
    if run.has_corpora:
        images, targets = largest_micro_batch(data.prepared, data.kinds, data.schedule, m)
    else:
        images, targets = _typical(run).largest_micro_batch(m)
    # min: the estimate lies some deviations above the mean, perhaps above what rows can hold.
    return MicroBatch(rows=m, seq_len=data.seq_len, n_images=images, n_targets=min(targets, m * data.seq_len))


def _n_micro_batches(run: RunDescription) -> int | None:
    if run.data is None:
        return None
    n, remainder = divmod(run.data.global_batch_rows, run.data.micro_batch_rows * run.world_size)
    return None if remainder else n


def setting_of(run: RunDescription, batch: MicroBatch, n_micro_batches: int) -> Setting:
    """Return the settings that a run's memory depends on."""
    options = run.strategy_options
    return Setting(
        batch=batch,
        device="cpu" if run.on_cpu else "cuda",
        precision=run.precision,
        strategy=run.strategy,
        world_size=run.world_size,
        n_micro_batches=n_micro_batches,
        freeze=run.freeze,
        ranks_per_replica=_ranks_per_replica(run),
        reshards=options.get("reshard_after_forward", True),
        sums_every_micro_batch=options.get("sync_every_micro_batch", True),
        has_bucket_views=options.get("gradient_as_bucket_view", False),
    )


def _ranks_per_replica(run: RunDescription) -> int | None:
    try:
        return run.ranks_per_replica
    except UserError:  # a problem of its own; memory is estimated all the same
        return None


def _parameters(net: Kosmos) -> list[Parameters]:
    return [Parameters(part, *_counts(net.get_submodule(part))) for part in PARTS]


def _counts(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _flops(run: RunDescription, forecasts: Iterable[SourceForecast], steps: int) -> Flops | None:
    """Return the operations of a step, every document taken to have the mean length of its source."""
    if run.kosmos is None or run.data is None or not steps:
        return None
    attends_to_row = run.kosmos.decoder.document_attention == "row"
    work = Work()
    for f in forecasts:
        a, length = f.amounts, run.data.seq_len if attends_to_row else f.document_length
        # `length` is a mean over positions: times the positions it is the sum of squared lengths, attention's pairs.
        work += Work(a.positions, round(a.positions * length), a.targets, a.images)
    total = ModelFlops(run.kosmos, run.freeze).training(work)
    return Flops(**{part: flops / steps for part, flops in asdict(total).items()})


def _communication(
    run: RunDescription, device: Device, net: Kosmos | None, batch: MicroBatch | None, n_micro: int, flops: Flops | None
) -> Communication | None:
    if net is None or batch is None or flops is None or run.world_size == 1:
        return None
    if device.peak is None or device.within_node is None or device.between_nodes is None:
        return None
    links = Links(within_node=device.within_node, between_nodes=device.between_nodes, devices_per_node=run.devices)
    at_peak = flops.blocks / device.peak_of_blocks(_is_fp8(run)) + flops.attention / device.peak
    block_seconds = at_peak / (device.share * run.world_size * n_micro)
    setting, is_fsdp1 = setting_of(run, batch, n_micro), "Fsdp1" in run.strategy_name
    return communication(Sizes.of(net), setting, links, block_seconds, root_every_micro_batch=is_fsdp1)


def _is_fp8(run: RunDescription) -> bool:
    return run.kosmos is not None and run.kosmos.decoder.fp8 != "none"


def _disk(run: RunDescription, net: Kosmos, steps: int) -> Disk:
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    moments = sum(2 * p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)  # Adam's two
    checkpoints = run.callback("Checkpoints")
    n = 0
    if checkpoints is not None:
        # The defaults of the callback, which a configuration may leave out.
        every, keep = int(checkpoints.get("every_n_train_steps") or 1000), int(checkpoints.get("keep") or 2)
        n_written = steps // every
        # The run's last step has one of its own; the oldest is deleted after the newest is written.
        n = min(n_written, keep) + bool(steps % every) + (n_written > keep)
    indexes = None
    if run.data is not None and run.has_corpora:
        folders = {Path(source.config.index) for source in run.data.sources.values()}  # a set: sources may share an index
        indexes = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    return Disk(weights + moments, n, indexes)
