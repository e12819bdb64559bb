"""What in a run's configuration contradicts itself, its data or its devices: all of it, not only what comes first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning.pytorch.strategies import StrategyRegistry

from kosmos_lit.checks.device import compute_dtype
from kosmos_lit.errors import UserError
from kosmos_lit.ops.fp8 import check_fp8
from kosmos_lit.ops.kernels import check_kernel
from kosmos_lit.preflight.estimates import Estimates, human_bytes
from kosmos_lit.preflight.run import Run
from kosmos_lit.sharding.fsdp import check_strategy
from kosmos_lit.tokenizer.vocabulary import LEADING, N_CONTROL_PIECES, TRAILING

N_SPECIAL = len(LEADING) + len(TRAILING) - N_CONTROL_PIECES
"""Ids that a vocabulary has beside its SentencePiece pieces."""
NO_BFLOAT16 = ("v100", "t4")
NO_EIGHT_BITS = ("v100", "a100", "a40", "rtx-30")
"""What their names begin with."""
NEAR = 64
"""How far to look for a number of ranks or rows that divides."""


def contradictions(run: Run, found: Estimates) -> list[str]:
    """Return everything that would stop the run, or make it another than what is asked for."""
    checks = (_sizes, _world, _steps, _validation, _strategy, _precision, _kernel, _eight_bits, _memory, _disk)
    return list(dict.fromkeys([*run.problems, *(problem for check in checks for problem in check(run, found))]))


def _sizes(run: Run, found: Estimates) -> Iterator[str]:
    if run.data is None or run.kosmos is None:
        return
    decoder, T, L = run.kosmos.decoder, run.data.seq_len, run.data.n_latents
    if decoder.max_seq_len < T:
        yield f"data.seq_len is {T}, but model.kosmos.decoder.max_seq_len is {decoder.max_seq_len}; raise the latter"
    ids, config = None, run.data.tokenizer_config
    if run.is_opened:
        ids = run.data.tokenizer.vocab_size
    elif config.vocab_size is not None:
        ids = config.vocab_size + N_SPECIAL
    if ids is not None and decoder.vocab_size < ids:
        yield (
            f"the tokenizer in {config.path} has {ids:,} ids, but model.kosmos.decoder.vocab_size is "
            f"{decoder.vocab_size:,}; set it to at least {ids}"
        )
    if any(s.images for s in found.sources) and L + 4 > T:
        yield f"data.seq_len {T} has no room for an image of {L} latents; it needs {L + 4}"


def _world(run: Run, found: Estimates) -> Iterator[str]:
    if run.data is None:
        return
    G, m, W = run.data.global_batch_rows, run.data.micro_batch_rows, run.world_size
    if G % (m * W):
        rows = sorted({G // (m * W) * m * W, -(-G // (m * W)) * m * W} - {0})
        ranks = _nearest(W, lambda w: G % (m * w) == 0)
        micro = [n for n in range(1, G // W + 1) if G % (n * W) == 0]
        ways = [f"global_batch_rows {' or '.join(map(str, rows))}"]
        ways += [f"{' or '.join(map(str, ranks))} ranks"] if ranks else []
        ways += [f"micro_batch_rows {', '.join(map(str, micro))}"] if micro else []
        rule = f"data.global_batch_rows {G} does not divide into {W} ranks x {m} micro_batch_rows"
        yield f"{rule}; these would: {'; '.join(ways)}"
    given = run.trainer.accumulate_grad_batches
    if given not in (None, 1):
        wanted = f", {found.n_micro_batches} here" if found.n_micro_batches else ""
        yield f"trainer.accumulate_grad_batches is {given}, but it follows from the data's numbers{wanted}; leave it out"


def _nearest(n: int, fits: Callable[[int], bool]) -> list[int]:
    """Return the next lower and the next higher number that fits, as far as there are any near."""
    below = next((k for k in range(n - 1, 0, -1) if fits(k)), None)
    above = next((k for k in range(n + 1, n + NEAR) if fits(k)), None)
    return [k for k in (below, above) if k is not None]


def _steps(run: Run, found: Estimates) -> Iterator[str]:
    o, last = run.optimizer, run.max_steps
    decay = o.total_steps or last
    if decay <= 0:
        yield "set trainer.max_steps (or model.optimizer.total_steps): the learning rate decays over them"
        return
    if o.warmup_steps >= decay:
        yield (
            f"model.optimizer.warmup_steps is {o.warmup_steps:,}, but the learning rate is to reach 0 at step {decay:,}: "
            "shorten the warm-up, or train longer"
        )
    if o.total_steps is not None and last > o.total_steps:
        yield (
            f"model.optimizer.total_steps is {o.total_steps:,}, but trainer.max_steps {last:,}: the last "
            f"{last - o.total_steps:,} steps would learn at a rate of 0"
        )
    if found.end is not None:
        yield f"training ends with step {found.steps:,}, not trainer.max_steps {last:,}: then {found.end}"


def _validation(run: Run, found: Estimates) -> Iterator[str]:
    every, last = run.trainer.val_check_interval, run.max_steps
    if isinstance(every, float) and every != 1.0:
        yield f"trainer.val_check_interval is {every:g}: the stream has no end to take a share of; give optimizer steps"
    elif isinstance(every, int) and not isinstance(every, bool) and 0 < last < every:
        yield f"trainer.val_check_interval is {every:,}, but the run has {last:,} steps: it would never validate"
    if run.data is not None and run.is_opened and not any(s.val is not None for s in run.data.prepared.values()):
        yield "no corpus has held-out documents; raise val_share of a corpus"
    if run.trainer.gradient_clip_algorithm not in (None, "norm"):
        yield f"trainer.gradient_clip_algorithm: only norm is supported, got {run.trainer.gradient_clip_algorithm}"


def _strategy(run: Run, found: Estimates) -> Iterator[str]:
    given = run.trainer.strategy
    if not given:
        return
    name = given if isinstance(given, str) else str(given.class_path)
    try:
        check_strategy(name)
    except UserError as error:
        yield str(error)
    else:
        if isinstance(given, str) and name != "auto" and name not in StrategyRegistry:
            yield f"trainer.strategy: there is no {name}; use -c configs/trainer/ddp.yaml or fsdp.yaml, or leave it out"


def _precision(run: Run, found: Estimates) -> Iterator[str]:
    if run.precision == "16-mixed":
        yield "trainer.precision: float16 with loss scaling is not supported; use bf16-mixed"
    if "bf16" in run.precision and found.device.name.startswith(NO_BFLOAT16):
        yield f"trainer.precision is {run.precision}, but a {found.device.name} has no bfloat16; use 32-true"
    if run.strategy == "fsdp" and run.precision not in ("32-true", "bf16-mixed"):
        yield f"trainer.precision is {run.precision}, but sharded training needs 32-true or bf16-mixed"
    if run.strategy == "one" and run.world_size > 1:
        yield f"{run.world_size} devices, but trainer.strategy is for one; use configs/trainer/ddp.yaml or fsdp.yaml"


def _kernel(run: Run, found: Estimates) -> Iterator[str]:
    if run.kosmos is None or not run.is_sound:
        return
    c = run.kosmos.decoder
    if c.attention_kernel == "auto" and not run.on_cpu:
        return  # what is installed there is not known here, and it takes what there is
    device = torch.device("cpu" if run.on_cpu else "cuda")
    try:
        check_kernel(c.attention_kernel, device, compute_dtype(run.precision), c.head_dim, c.attention_dropout_rate)
    except UserError as error:
        yield str(error)


def _eight_bits(run: Run, found: Estimates) -> Iterator[str]:
    if run.kosmos is None or run.data is None or not run.kosmos.decoder.fp8:
        return
    if run.on_cpu:
        try:
            check_fp8(torch.device("cpu"), torch.float32, {}, run.data.seq_len)
        except UserError as error:
            yield str(error)
    elif found.device.name.startswith(NO_EIGHT_BITS):
        yield f"decoder.fp8: {found.device.name} multiplies no 8-bit floats; set it to false"
    elif run.precision != "bf16-mixed":
        yield f"decoder.fp8 goes with trainer.precision bf16-mixed, but it is {run.precision}; set it to false"


def _memory(run: Run, found: Estimates) -> Iterator[str]:
    memory, there, batch = found.memory, found.device.memory, found.batch
    if memory is None or there is None or batch is None:
        return
    needed = memory.total if run.on_cpu else memory.needed
    if needed > there:
        ways = "; or ".join(found.fitting) or "a smaller model, or more devices"
        device = "device" if found.device.name == "given" else found.device.name
        spare = "" if run.on_cpu else ", with what an allocator loses,"
        yield (
            f"a step needs {human_bytes(needed)}{spare} of each {device}, which has {human_bytes(there)} "
            f"(micro-batches of {batch.rows} rows, up to {batch.n_images} images); what would fit: {ways}"
        )


def _disk(run: Run, found: Estimates) -> Iterator[str]:
    if found.disk is None:
        return
    wanted = Path(run.trainer.default_root_dir or ".").absolute()
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if found.disk.needed > free:
        yield (
            f"{found.disk.n_checkpoints} checkpoints of {human_bytes(found.disk.checkpoint)} make "
            f"{human_bytes(found.disk.needed)}, but {folder} has {human_bytes(free)} free: keep fewer "
            "(Checkpoints.keep), or set trainer.default_root_dir elsewhere"
        )
