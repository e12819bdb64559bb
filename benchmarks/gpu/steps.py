"""Twenty real steps of configs/kosmos1.yaml on drawn data, as a user starts them: `main.py fit`, with FSDP2 and with DDP.

The world's corpora are drawn as files of the three formats and prepared like any others; the commands are recorded. Both
runs read the same rows, start from the same weights and draw the same dropout masks, so that their losses differ by
roundings alone: FSDP2 gathers blocks in bfloat16, the weights of their LayerNorms too, which autocast keeps in float32.
`LOSS_TOLERANCE` and `NORM_TOLERANCE` say by how much.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.bench import Bench, Results, verdict
from datamodules.world.write import WorldConfig, write_world
from kosmos_lit.cli.run_log import read_log
from kosmos_lit.config import DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.costs.memory import EstimateError, MicroBatch, Setting, estimate

ROOT = Path(__file__).parents[2]
OVERLAY = "benchmarks/gpu/steps.yaml"
STRATEGIES = {"FSDP2": "configs/trainer/fsdp.yaml", "DDP": "configs/trainer/ddp.yaml"}
"""One device each; FSDP2 first, as it is what has never run on a GPU."""
N_STEPS, GLOBAL_ROWS = 20, 24
"""As `OVERLAY` has them."""
MICRO_ROWS = (12, 8, 6, 4, 3, 2, 1)
"""Rows of a micro-batch, the largest first; at least two make a step, so that gradients are accumulated."""
IMAGES, TARGETS = 15, 1600
"""Of a row of such a micro-batch, at most: ten twelfths of the rows are text and captions, half and half."""
HEADROOM = 0.85
"""Share of the memory that an estimate may take: sharding has buffers beside what one device needs."""
LOSS_TOLERANCE = 1e-3
"""Largest relative difference of a step's loss. A rounding to bfloat16 is 2^-9 = 0.2 % of a logit, and moves a token's loss
by some 0.002 nats; the mean over a step's 25,000 targets by 1e-5. What remains is that roundings steer the weights apart: of
a loss that falls by about a nat in twenty steps of a warm-up, some per cent, 1e-3 of 11 nats. A small model on a CPU differs
by 3e-5. Two steps' losses differ by more, as their rows do."""
NORM_TOLERANCE = 0.05
"""Largest relative difference of a gradient's norm before clipping: a sum that is scaled wrongly is off by a factor. A small
model on a CPU differs by 1 %."""
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--model.kosmos.vision.architecture=configs/vision/tiny_48.json",
    "--model.kosmos.vision.image_size=48",
    "--model.kosmos.connector.n_heads=4",
    "--model.kosmos.decoder.dim=64",
    "--model.kosmos.decoder.n_layers=2",
    "--model.kosmos.decoder.n_heads=4",
    "--model.kosmos.decoder.ffn_dim=128",
    "--model.kosmos.decoder.vocab_size=320",
    "--model.kosmos.decoder.attention_kernel=sdpa",
    "--data.seq_len=256",
    "--data.num_workers=0",
    "--data.prepare_workers=1",
]
"""Flags of a rehearsal; xformers needs CUDA."""


def real_steps(bench: Bench) -> Results:
    """Train with each strategy, and compare losses and gradient norms, step by step.

    Raises: RuntimeError with the end of a run's output if FSDP2's fails.
    """
    bench.drop_model()
    runs: dict[str, Results] = {}
    results: Results = {"loss tolerance": LOSS_TOLERANCE, "norm tolerance": NORM_TOLERANCE, "runs": runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"n_pairs": 300, "n_pages": 60, "n_texts": 300} if bench.tiny else {}  # enough for 300 pieces
        workers = 1 if bench.tiny else 8
        write_world(WorldConfig(path=str(folder / "world"), shards=workers, workers=workers, **(DRAWN | sizes)))
        rows, longest = micro_rows(bench), 0.0
        for strategy, overlay in STRATEGIES.items():
            if bench.left() < longest:
                runs[strategy] = {"skipped": f"{bench.left():.0f} s left, and a run takes {longest:.0f} s"}
                continue
            begun = time.monotonic()
            runs[strategy] = fit(bench, overlay, folder, rows)
            longest = time.monotonic() - begun
            results["verdicts"] = compare(runs)
            bench.report(results)
    if "error" in runs["FSDP2"]:
        raise RuntimeError(f"FSDP2: {runs['FSDP2']['error']}")
    return results


DRAWN = {"n_pairs": 3000, "n_pages": 600, "n_texts": 3000}
"""Documents of the world: twenty steps read each of them a few times."""


def micro_rows(bench: Bench) -> int:
    """Return the most rows of a micro-batch whose step is estimated to leave headroom on the device."""
    if bench.tiny:
        return MICRO_ROWS[0]
    config = KosmosConfig(vision=VisionConfig(pretrained=None), decoder=DecoderConfig(attention_kernel="xformers"))
    available = HEADROOM * bench.available_bytes()
    for rows in MICRO_ROWS:
        sizes = MicroBatch(rows=rows, seq_len=2048, n_images=IMAGES * rows, n_targets=TARGETS * rows)
        setting = Setting(batch=sizes, device="cuda", precision="bf16-mixed", n_micro_batches=GLOBAL_ROWS // rows)
        try:
            if estimate(config, setting).needed <= available:
                return rows
        except EstimateError:
            return 3  # configs/kosmos1.yaml's own, for GPUs of 80 GB
    return 1


def fit(bench: Bench, overlay: str, folder: Path, rows: int) -> Results:
    """Run `main.py fit`, and return its command, its steps, their rate and memory; or the end of its output as `error`."""
    run = folder / Path(overlay).stem
    flags = [f"--data.micro_batch_rows={rows}", *(TINY if bench.tiny else [])]
    command = [
        sys.executable,
        "main.py",
        "fit",
        "-c",
        "configs/kosmos1.yaml",
        "-c",
        overlay,
        "-c",
        OVERLAY,
        "--trainer.devices=1",
        f"--trainer.default_root_dir={run}",
        *data_flags(folder),
        *flags,
    ]
    results: Results = {"command": shlex.join(command[1:]), "micro-batch rows": rows}
    with (folder / f"{run.name}.log").open("w+", encoding="utf-8") as log:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | str = process.wait(max(1.0, bench.left() - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "none: its time was over"
        results["seconds"] = round(time.monotonic() - begun, 1)
        log.seek(0)
        lines = log.read().splitlines()
    steps = read_log(run)
    results |= {"steps": table_of(steps)} | speed_of(steps)
    if code != 0:
        results |= {"error": f"exit code {code}: {next(reversed(lines), '')}", "end": lines[-40:]}
    return results


def data_flags(folder: Path) -> list[str]:
    """Return the flags by which kosmos1.yaml reads the drawn world; both runs share its tokenizer and indexes."""
    files = {"text": "text-*.jsonl.zst", "caption": "caption-*.tar", "interleaved": "pages-*.warc.gz"}
    flags = [f"--data.tokenizer.path={folder / 'tokenizer'}"]
    for kind, pattern in files.items():
        flags += [f"--data.{kind}.input=[{folder / 'world' / pattern}]", f"--data.{kind}.index={folder / 'index' / kind}"]
    return flags


def table_of(rows: Mapping[int, Mapping[str, str]]) -> Results:
    """Return the columns that are compared, step by step."""
    columns = {"loss": "train/loss", "gradient norm": "grad_norm", "rows read": "rows", "tokens/s": "tokens_per_second"}
    return {name: [float(row[column]) for row in rows.values()] for name, column in columns.items()}


def speed_of(rows: Mapping[int, Mapping[str, str]]) -> Results:
    """Return the median rate of the steps behind the first four, in which kernels are compiled, and the peak memory."""
    later = [row for step, row in rows.items() if step > 4] or list(rows.values())[-1:]
    if not later:
        return {}
    medians = {"tokens/s": "tokens_per_second", "images/s": "images_per_second", "TFLOP/s": "tflops"}
    speed = {name: statistics.median(float(row[column]) for row in later) for name, column in medians.items()}
    peak = {name: float(value) for name, value in later[-1].items() if name.startswith("memory/") and value}
    return {"median": speed, "peak bytes": peak}


def compare(runs: Mapping[str, Results]) -> Results:
    """Return the verdicts: all steps done, losses and norms those of DDP, and the same rows read."""
    sharded, plain = (runs.get(name, {}).get("steps", {}) for name in STRATEGIES)
    if not sharded or not sharded["loss"]:
        return {}
    n_steps = len(sharded["loss"])
    verdicts = {"steps with FSDP2": verdict(n_steps, N_STEPS, N_STEPS)}
    if plain and plain["loss"]:
        for metric, tolerance in {"loss": LOSS_TOLERANCE, "gradient norm": NORM_TOLERANCE}.items():
            difference = largest_difference(sharded[metric], plain[metric])
            verdicts[f"{metric}: FSDP2 beside DDP, off by"] = verdict(difference, tolerance, tolerance, at_most=True)
        same = sum(a == b for a, b in zip(sharded["rows read"], plain["rows read"], strict=False)) / n_steps
        verdicts["share of steps that read the same rows"] = verdict(same, 1.0, 1.0)
    return verdicts


def largest_difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference; infinity if a number is missing or none."""
    if len(actual) != len(expected) or not all(map(_is_number, [*actual, *expected])):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))


def _is_number(value: float) -> bool:
    return value == value and abs(value) != float("inf")
