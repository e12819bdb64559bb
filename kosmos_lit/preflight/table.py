"""A plan for people: a page of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kosmos_lit.preflight.estimates import Estimates, human_bytes
from kosmos_lit.preflight.run import Run

INDENT = 14


def page(run: Run, found: Estimates, problems: Sequence[str]) -> str:
    """Return all of a plan."""
    sections = (_model(found), _run(run, found), _reading(found), _computing(found), _memory(found), _disk(found))
    lines = [line for section in sections for line in section]
    lines += [line for note in run.notes for line in _entry("note", note)]
    if problems:
        lines += ["", f"{len(problems)} contradiction{'s' * (len(problems) != 1)}:", *(f"  - {p}" for p in problems)]
    return "\n".join(lines)


def _entry(name: str, *texts: str) -> Iterator[str]:
    for n, text in enumerate(texts):
        yield f"{'' if n else name:<{INDENT}}{text}"


def _model(found: Estimates) -> Iterator[str]:
    if not found.parameters:
        return
    total, trained = (sum(getattr(p, field) for p in found.parameters) for field in ("total", "trained"))
    parts = ", ".join(f"{p.part} {short(p.total)}{_trained(p.trained, p.total)}" for p in found.parameters)
    yield from _entry("parameters", f"{short(total)}, of which {short(trained)} train: {parts}")


def _trained(trained: int, total: int) -> str:
    return "" if trained == total else " (frozen)" if not trained else f" ({short(trained)} train)"


def _run(run: Run, found: Estimates) -> Iterator[str]:
    where = f"{run.nodes} x {run.devices}" if run.nodes > 1 else f"{run.devices}"
    how = {"one": "", "ddp": ", DDP", "fsdp": ", FSDP"}[run.strategy]
    device = found.device
    size = f" of {human_bytes(device.memory)}" if device.memory else ""
    yield from _entry("devices", f"{where} {device.name}{size}{how}, {run.precision}")
    if run.data is None:
        return
    data = run.data
    accumulated = f"{found.n_micro_batches} micro-batches of {data.micro_batch_rows} a device"
    rows = f"{data.global_batch_rows:,} rows of {data.seq_len:,} positions"
    yield from _entry("step", f"{rows} = {accumulated if found.n_micro_batches else 'rows that do not divide'}")


def _reading(found: Estimates) -> Iterator[str]:
    if not found.sources:
        return
    yield from _entry("run", f"{found.steps:,} steps, {short(sum(s.positions for s in found.sources))} tokens")
    about = "" if found.exact else " (expected)"
    wide = max(INDENT + 8, *(len(s.name) + 4 for s in found.sources))
    heads = ("share", "rows", "tokens", "supervised", "images", "epochs")
    yield f"  {'reads' + about:<{wide - 2}}" + "".join(f"{h:>12}" for h in heads)
    rows = sum(s.rows for s in found.sources)
    for s in found.sources:
        epochs = "?" if s.epochs is None else f"{s.epochs:.2f}"
        counts = (short(n) for n in (s.rows, s.positions, s.targets, s.images))
        cells = (f"{s.rows / max(1, rows):.1%}", *counts, epochs)
        yield f"    {s.name:<{wide - 4}}" + "".join(f"{c:>12}" for c in cells)


def _computing(found: Estimates) -> Iterator[str]:
    if found.flops is None:
        return
    f = found.flops
    named = {"decoder": f.blocks + f.attention, "head": f.head, "tower": f.vision, "connector": f.connector}
    parts = ", ".join(f"{name} {value / max(1.0, f.total):.0%}" for name, value in named.items())
    yield from _entry("operations", f"{scaled(f.total, 'FLOP')} a step: {parts}")
    seconds, device = found.step_seconds, found.device
    if seconds is None or device.peak is None:
        yield from _entry("time", "unknown: give the device's peak with --peak TFLOP/S")
        return
    at = f"at {device.share:.0%} of {device.peak / 1e12:,.4g} TFLOP/s a device"
    yield from _entry("time", f"{seconds:,.3g} s a step, {duration(seconds * found.steps)} for the run, {at}")
    tokens, images = found.positions_per_step / seconds, found.images_per_step / seconds
    W = found.world_size
    each = f" ({short(tokens / W)} and {short(images / W)} a device)" if W > 1 else ""
    yield from _entry("", f"which takes {short(tokens)} tokens/s and {short(images)} images/s{each}")


def _memory(found: Estimates) -> Iterator[str]:
    if found.memory is None or found.batch is None:
        return
    memory, b = found.memory, found.batch
    yield from _entry("memory", f"{human_bytes(memory.total)} a device at most, in micro-batches with {b.n_images} images")
    parts = [f"{name} {human_bytes(size)}" for name, size in memory.parts.items() if size >= 0.002 * memory.total]
    for at in range(0, len(parts), 3):
        yield f"{'':<{INDENT}}{', '.join(parts[at : at + 3])}{',' if at + 3 < len(parts) else ''}"


def _disk(found: Estimates) -> Iterator[str]:
    if (disk := found.disk) is None:
        return
    indexes = "" if disk.indexes is None else f"; the indexes take {human_bytes(disk.indexes)}"
    up_to = f"up to {disk.n_checkpoints} at a time: {human_bytes(disk.needed)}"
    yield from _entry("disk", f"{human_bytes(disk.checkpoint)} a checkpoint, {up_to}{indexes}")


def short(n: float) -> str:
    """Return a number with three digits and a letter: 1.66 B."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(n) >= size:
            return f"{n / (1e3 if letter == ' k' else size):.3g}{letter}"
    return f"{n:,.0f}" if abs(n) >= 10 or n == int(n) else f"{n:.2g}"


def scaled(n: float, unit: str) -> str:
    """Return a number in a unit with a prefix: 11.3 PFLOP."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if n >= size:
            return f"{n / size:.3g} {prefix}{unit}"
    return f"{n / 1e6:,.3g} M{unit}"


def duration(seconds: float) -> str:
    """Return a time for a person."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
