"""Problems of a run: where its configuration contradicts itself, its data or its devices. All of them are listed."""

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
from kosmos_lit.preflight.estimates import Estimates
from kosmos_lit.preflight.run_description import RunDescription
from kosmos_lit.preflight.units import format_bytes
from kosmos_lit.sharding.fsdp import check_strategy
from kosmos_lit.tokenizer.vocabulary import LEADING, N_CONTROL_PIECES, TRAILING

N_SPECIAL = len(LEADING) + len(TRAILING) - N_CONTROL_PIECES
"""Ids of a vocabulary that are no SentencePiece pieces."""
NO_BFLOAT16 = ("v100", "t4")
NO_FP8 = ("v100", "a100", "a40", "rtx-30")
"""Devices without bfloat16, and without 8-bit floats: beginnings of their names."""
CAPABILITIES = {"h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "a100-80": (8, 0), "a100-40": (8, 0), "v100-32": (7, 0)}
"""CUDA capabilities of some devices; those of others are not checked."""
SEARCH_RANGE = 64
"""How much larger a number of ranks that divides the batch may be, to be suggested."""


def find_problems(run: RunDescription, estimates: Estimates) -> list[str]:
    """Return everything that would stop the run, or make it differ from what its configuration says."""
    checks = (_sizes, _world, _steps, _validation, _strategy, _precision, _kernel, _fp8, _memory, _disk)
    # dict.fromkeys: the same problem may be met when the configuration is read, and by a check.
    return list(dict.fromkeys([*run.problems, *(problem for check in checks for problem in check(run, estimates))]))


def _sizes(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if run.data is None or run.kosmos is None:
        return
    decoder, T, L = run.kosmos.decoder, run.data.seq_len, run.data.n_latents
    if decoder.max_seq_len < T:
        yield f"data.seq_len is {T}, but model.kosmos.decoder.max_seq_len is {decoder.max_seq_len}; raise the latter"
    ids, config = None, run.data.tokenizer_config
    # The tokenizer itself if it is trained, else the size that it is to have.
    if run.has_corpora:
        ids = run.data.tokenizer.vocab_size
    elif config.vocab_size is not None:
        ids = config.vocab_size + N_SPECIAL
    if ids is not None and decoder.vocab_size < ids:
        yield (
            f"the tokenizer in {config.path} has {ids:,} ids, but model.kosmos.decoder.vocab_size is "
            f"{decoder.vocab_size:,}; set it to at least {ids}"
        )
    if any(s.images for s in estimates.sources) and L + 4 > T:
        yield f"data.seq_len {T} has no room for an image of {L} latents; it needs {L + 4}"


def _world(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if run.data is None:
        return
    G, m, W = run.data.global_batch_rows, run.data.micro_batch_rows, run.world_size
    if G % (m * W):
        # The next multiples below and above; 0 is none.
        rows = sorted({G // (m * W) * m * W, -(-G // (m * W)) * m * W} - {0})
        ranks = _nearest(W, lambda w: G % (m * w) == 0)
        micro = [n for n in range(1, G // W + 1) if G % (n * W) == 0]
        changes = [f"global_batch_rows {' or '.join(map(str, rows))}"]
        changes += [f"{' or '.join(map(str, ranks))} ranks"] if ranks else []
        changes += [f"micro_batch_rows {', '.join(map(str, micro))}"] if micro else []
        rule = f"data.global_batch_rows {G} does not divide into {W} ranks x {m} micro_batch_rows"
        yield f"{rule}; these would: {'; '.join(changes)}"
    accumulated = run.trainer.accumulate_grad_batches
    if accumulated not in (None, 1):
        result = f" ({estimates.n_micro_batches})" if estimates.n_micro_batches else ""
        rule = f"it follows from the data's numbers{result}; leave it out"
        yield f"trainer.accumulate_grad_batches is {accumulated}, but {rule}"


def _nearest(n: int, fits: Callable[[int], bool]) -> list[int]:
    """Return the next lower and the next higher number that fits, if there are any within reach."""
    below = next((k for k in range(n - 1, 0, -1) if fits(k)), None)
    above = next((k for k in range(n + 1, n + SEARCH_RANGE) if fits(k)), None)
    return [k for k in (below, above) if k is not None]


def _steps(run: RunDescription, estimates: Estimates) -> Iterator[str]:
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
    if estimates.end is not None:
        yield f"training ends with step {estimates.steps:,}, not trainer.max_steps {last:,}: then {estimates.end}"


def _validation(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    every, last = run.trainer.val_check_interval, run.max_steps
    # 1.0 is Lightning's own default, not a choice of the configuration.
    if isinstance(every, float) and every != 1.0:
        yield f"trainer.val_check_interval is {every:g}: the stream has no end to take a share of; give optimizer steps"
    elif isinstance(every, int) and not isinstance(every, bool) and 0 < last < every:  # bool is an int
        yield f"trainer.val_check_interval is {every:,}, but the run has {last:,} steps: it would never validate"
    if run.data is not None and run.has_corpora and not any(s.val is not None for s in run.data.prepared.values()):
        yield "no corpus has held-out documents; raise val_share of a corpus"
    if run.trainer.gradient_clip_algorithm not in (None, "norm"):
        yield f"trainer.gradient_clip_algorithm: only norm is supported, got {run.trainer.gradient_clip_algorithm}"


def _strategy(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    strategy = run.trainer.strategy
    if not strategy:
        return
    name = strategy if isinstance(strategy, str) else str(strategy.class_path)
    try:
        check_strategy(name)
        _ = run.ranks_per_replica
    except UserError as error:
        yield str(error)
    else:
        # Names that only the trainer would refuse.
        if isinstance(strategy, str) and name != "auto" and name not in StrategyRegistry:
            yield f"trainer.strategy: there is no {name}; use -c configs/trainer/ddp.yaml or fsdp.yaml, or leave it out"


def _precision(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if run.precision == "16-mixed":
        yield "trainer.precision: float16 with loss scaling is not supported; use bf16-mixed"
    if "bf16" in run.precision and estimates.device.name.startswith(NO_BFLOAT16):
        yield f"trainer.precision is {run.precision}, but a {estimates.device.name} has no bfloat16; use 32-true"
    if run.strategy == "fsdp" and run.precision not in ("32-true", "bf16-mixed"):
        yield f"trainer.precision is {run.precision}, but sharded training needs 32-true or bf16-mixed"


def _kernel(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if run.kosmos is None or not run.is_sound:
        return
    c = run.kosmos.decoder
    if c.attention_kernel == "auto" and not run.on_cpu:
        return  # takes whatever the training machine has, which may not be this one
    device = torch.device("cpu" if run.on_cpu else "cuda")
    try:
        check_kernel(
            c.attention_kernel,
            device,
            compute_dtype(run.precision),
            c.head_dim,
            c.attention_dropout_rate,
            within=c.document_attention,
            capability=CAPABILITIES.get(estimates.device.name),
        )
    except UserError as error:
        yield str(error)


def _fp8(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if run.kosmos is None or run.data is None or run.kosmos.decoder.fp8 == "none":
        return
    if run.on_cpu:
        try:
            check_fp8(torch.device("cpu"), torch.float32, {}, run.data.seq_len)
        except UserError as error:
            yield str(error)
    elif estimates.device.name.startswith(NO_FP8):
        yield f"decoder.fp8: {estimates.device.name} multiplies no 8-bit floats; set it to none"
    elif run.precision != "bf16-mixed":
        yield f"decoder.fp8 goes with trainer.precision bf16-mixed, but it is {run.precision}; set it to none"


def _memory(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    memory, available, batch = estimates.memory, estimates.device.memory, estimates.batch
    if memory is None or available is None or batch is None:
        return
    # `needed` has what a GPU's caching allocator loses; a CPU's does not.
    needed = memory.total if run.on_cpu else memory.needed
    if needed > available:
        changes = "; or ".join(estimates.fitting) or "a smaller model, or more devices"
        reserve = "" if run.on_cpu else ", the allocator's losses included,"
        yield (
            f"a step needs {format_bytes(needed)}{reserve} of each {estimates.device.name}, which has "
            f"{format_bytes(available)} (micro-batches of {batch.rows} rows, up to {batch.n_images} images); "
            f"what would fit: {changes}"
        )


def _disk(run: RunDescription, estimates: Estimates) -> Iterator[str]:
    if estimates.disk is None:
        return
    root = Path(run.trainer.default_root_dir or ".").absolute()
    folder = next(path for path in (root, *root.parents) if path.exists())  # the run's own may not exist yet
    free = shutil.disk_usage(folder).free
    if estimates.disk.needed > free:
        yield (
            f"{estimates.disk.n_checkpoints} checkpoints of {format_bytes(estimates.disk.checkpoint)} make "
            f"{format_bytes(estimates.disk.needed)}, but {folder} has {format_bytes(free)} free: keep fewer "
            "(Checkpoints.keep), or set trainer.default_root_dir elsewhere"
        )
