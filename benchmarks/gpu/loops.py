"""What stands around the model: the loader that feeds it, and Lightning's loop with and without FSDP2 over a bare one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import data as loader_benchmark
from benchmarks import images, loop
from benchmarks.data_inputs import make
from benchmarks.data_pipelines import rendering
from benchmarks.gpu.bench import Bench, Results, TrainStep, verdict
from datamodules.loader import BatchLayout, Loader, MicroBatches

IMAGES_NEEDED = 550.0
"""Images per second that feed one GPU, with a margin of one half."""


def loader(bench: Bench) -> Results:
    """Measure the loader on four processes: its rate, how long training waits for it, decoding, and padding."""
    workers = 0 if bench.tiny else 4
    n_pairs, n_texts, n_documents = (2, 61, 256) if bench.tiny else (1024, 4000, 1024)
    with tempfile.TemporaryDirectory() as folder:
        inputs = make(Path(folder), n_pairs, n_texts, n_documents, 311 if bench.tiny else 2000)
        data = inputs.data("256 px")
        own, *others = loader_benchmark.compare(inputs, "256 px", workers, 4 if bench.tiny else 200, 1 if bench.tiny else 3)
        totals = data.prepared["caption"].train.plan.totals
        padding = 1 - totals.positions / (totals.rows * data.seq_len)
        wait = _data_wait(bench, data, workers)
    jpegs = [images.make_jpeg(256, 256, 95, seed) for seed in range(4 if bench.tiny else 24)]
    decoding = images.compare("256 x 256", jpegs, 1 if bench.tiny else 9)
    verdicts = {
        "images/s": verdict(float(own["images/s"]), IMAGES_NEEDED, 2 * IMAGES_NEEDED),  # type: ignore[arg-type]
        "share of time that training waits": verdict(wait, 0.01, 0.003, at_most=True),
        "decoding over Pillow": verdict(float(decoding["ratio"]), 2.0, 3.0),  # type: ignore[arg-type]
        "padding of captions": verdict(padding, 0.01, 0.003, at_most=True),
    }
    return {"verdicts": verdicts, "others": others, "decoding": decoding}


def _data_wait(bench: Bench, data: Any, workers: int) -> float:
    """Return the share of time that training on captions spends waiting for their loader."""
    n_rows = max(1, bench.sizes.rows // 2)  # captions hold many images
    layout = BatchLayout(first_row=0, global_batch_rows=n_rows, micro_batch_rows=n_rows)
    batches = Loader(MicroBatches(data.stream(), layout, rendering(data)), workers)
    model, step = bench.model(bench.config(max_seq_len=data.seq_len)), None
    begun = waited = 0.0
    n_steps, n_warm_up = bench.n_steps, bench.n_warm_up
    for number, batch in zip(range(n_steps + n_warm_up), batches, strict=False):
        if number == n_warm_up:
            begun, waited = loop.now(bench.device)[0], batches.waited_seconds
        step = step or TrainStep(bench, model, batch)
        step.batch = batch.to(bench.device)
        step()
    return (batches.waited_seconds - waited) / (loop.now(bench.device)[0] - begun)


def trainer(bench: Bench) -> Results:
    """Compare Lightning's Trainer with a bare loop, and FSDP2 on one rank with none."""
    bench.drop_model()
    flags = ["--trainer.accelerator=cpu"]
    if not bench.tiny:
        s = bench.sizes
        flags = [
            "--trainer.accelerator=gpu",
            "--trainer.precision=bf16-mixed",
            f"--model.kosmos.decoder.dim={s.dim}",
            f"--model.kosmos.decoder.n_layers={s.n_layers}",
            f"--model.kosmos.decoder.n_heads={s.n_heads}",
            f"--model.kosmos.decoder.ffn_dim={4 * s.dim}",
            f"--model.kosmos.decoder.vocab_size={s.vocab}",
            "--data.global_batch_rows=128",
            "--data.micro_batch_rows=128",
        ]
    trainers = {"Trainer": loop.TRAINERS["every 10 steps"]}
    if bench.on_gpu:
        trainers["FSDP2"] = ["-c", "configs/trainer/fsdp.yaml", "--trainer.devices=1", *trainers["Trainer"]]
    with tempfile.TemporaryDirectory() as folder:
        run = loop.Loop(flags, Path(folder), bench.n_steps)
        lines = {str(line["loop"]): line for line in loop.compare(run, 1 if bench.tiny else 2, trainers)}
    verdicts = {"Trainer over a bare loop": verdict(lines["Trainer"]["clock ratio"], 0.99, 0.995)}
    if "FSDP2" in lines:
        ratio = lines["Trainer"]["clock ms a step"] / lines["FSDP2"]["clock ms a step"]
        verdicts["FSDP2 on one rank over none"] = verdict(ratio, 0.98, 0.99)
    return {"verdicts": verdicts, "variants": lines}
