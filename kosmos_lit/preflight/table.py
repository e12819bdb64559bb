"""A plan as text: one entry a subject, and a table of the sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import indent

from kosmos_lit.preflight.estimates import Estimates
from kosmos_lit.preflight.run_description import RunDescription
from kosmos_lit.preflight.units import format_bytes, format_count, format_duration, format_scaled
from kosmos_lit.terminal import table

INDENT = 14


def format_plan(run: RunDescription, estimates: Estimates, problems: Sequence[str]) -> str:
    """Return a plan as text."""
    e = estimates
    sections = (_parameters(e), _devices(run, e), _sources(e), _operations(e), _communication(run, e), _memory(e), _disk(e))
    lines = [line for section in sections for line in section]
    lines += [_entry("note", note) for note in run.notes]
    if problems:
        lines += ["", f"{len(problems)} problem{'s' * (len(problems) != 1)}:", *(f"  - {p}" for p in problems)]
    return "\n".join(lines)


def _entry(name: str, text: str) -> str:
    return f"{name:<{INDENT}}{text}"


def _parameters(estimates: Estimates) -> Iterator[str]:
    if not estimates.parameters:
        return
    total, trained = (sum(getattr(p, field) for p in estimates.parameters) for field in ("total", "trained"))
    parts = ", ".join(f"{p.part} {format_count(p.total)}{_trained(p.trained, p.total)}" for p in estimates.parameters)
    yield _entry("parameters", f"{format_count(total)}, of which {format_count(trained)} train: {parts}")


def _trained(trained: int, total: int) -> str:
    return "" if trained == total else " (frozen)" if not trained else f" ({format_count(trained)} train)"


def _devices(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    number = f"{run.nodes} x {run.devices}" if run.nodes > 1 else f"{run.devices}"
    strategy = {"one": "", "ddp": ", DDP", "fsdp": ", FSDP"}[run.strategy]
    if (shard_size := run.strategy_options.get("shard_size")) is not None:
        strategy = f", HSDP ({shard_size if shard_size == 'node' else f'{shard_size} ranks'} a replica)"
    device = estimates.device
    size = f" of {format_bytes(device.memory)}" if device.memory else ""
    yield _entry("devices", f"{number} {device.name}{size}{strategy}, {run.precision}")
    if run.data is None:
        return
    data = run.data
    accumulated = f"{estimates.n_micro_batches} micro-batches of {data.micro_batch_rows} a device"
    rows = f"{data.global_batch_rows:,} rows of {data.seq_len:,} positions"
    yield _entry("step", f"{rows} = {accumulated if estimates.n_micro_batches else 'rows that do not divide'}")


def _sources(estimates: Estimates) -> Iterator[str]:
    if not (sources := estimates.sources):
        return
    yield _entry("run", f"{estimates.steps:,} steps, {format_count(sum(s.positions for s in sources))} tokens")
    n_rows = max(1, sum(s.rows for s in sources))  # a run may have no steps
    rows = []
    for s in sources:
        counts = [format_count(n) for n in (s.rows, s.positions, s.targets, s.images)]
        rows.append((f"  {s.name}", f"{s.rows / n_rows:.1%}", *counts, "?" if s.epochs is None else f"{s.epochs:.2f}"))
    first = "reads" if estimates.exact else "reads (expected)"
    yield indent(table((first, "share", "rows", "tokens", "supervised", "images", "epochs"), rows), "  ")


def _operations(estimates: Estimates) -> Iterator[str]:
    if estimates.flops is None:
        return
    f = estimates.flops
    named = {"decoder": f.blocks + f.attention, "head": f.head, "tower": f.vision, "connector": f.connector}
    parts = ", ".join(f"{name} {value / max(1.0, f.total):.0%}" for name, value in named.items())
    yield _entry("operations", f"{format_scaled(f.total, 'FLOP')} a step: {parts}")
    seconds, device = estimates.step_seconds, estimates.device
    if seconds is None or device.peak is None:
        yield _entry("time", "unknown: give the device's peak with --peak TFLOP/S")
        return
    in_8_bits = f" ({device.peak_fp8 / 1e12:,.5g} in 8 bits)" if estimates.fp8 and device.peak_fp8 else ""
    at = f"at {device.share:.0%} of {device.peak / 1e12:,.4g} TFLOP/s{in_8_bits} a device"
    yield _entry("time", f"{seconds:,.3g} s a step, {format_duration(seconds * estimates.steps)} for the run, {at}")
    tokens, images = estimates.positions_per_step / seconds, estimates.images_per_step / seconds
    W = estimates.world_size
    each = f" ({format_count(tokens / W)} and {format_count(images / W)} a device)" if W > 1 else ""
    yield _entry("", f"which takes {format_count(tokens)} tokens/s and {format_count(images)} images/s{each}")


def _communication(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if estimates.world_size == 1:
        return
    c, device = estimates.communication, estimates.device
    if c is None or device.within_node is None or device.between_nodes is None:
        if device.within_node is None or device.between_nodes is None:
            yield _entry("communication", "unknown: give bandwidths with --node_gb_s and --network_gb_s")
        return
    ways = [f"{format_bytes(n)} {at}" for n, at in ((c.within_node, "in a node"), (c.between_nodes, "between nodes")) if n]
    rates = f"{device.within_node / 1e9:,.4g} and {device.between_nodes / 1e9:,.4g} GB/s"
    yield _entry("communication", f"each device sends {' and '.join(ways) or 'nothing'} a step")
    exposed = f"of which computing can hide all but {c.exposed_seconds:,.3g} s"
    yield _entry("", f"{c.seconds:,.3g} s at {rates} in a node and between nodes, {exposed}")


def _memory(estimates: Estimates) -> Iterator[str]:
    if estimates.memory is None or estimates.batch is None:
        return
    memory, b = estimates.memory, estimates.batch
    yield _entry("memory", f"{format_bytes(memory.total)} a device at most, in micro-batches with {b.n_images} images")
    parts = [f"{name} {format_bytes(size)}" for name, size in memory.parts.items() if size >= 0.002 * memory.total]
    for at in range(0, len(parts), 3):
        yield _entry("", f"{', '.join(parts[at : at + 3])}{',' if at + 3 < len(parts) else ''}")


def _disk(estimates: Estimates) -> Iterator[str]:
    if (disk := estimates.disk) is None:
        return
    indexes = "" if disk.indexes is None else f"; the indexes take {format_bytes(disk.indexes)}"
    up_to = f"up to {disk.n_checkpoints} at a time: {format_bytes(disk.needed)}"
    yield _entry("disk", f"{format_bytes(disk.checkpoint)} a checkpoint, {up_to}{indexes}")
