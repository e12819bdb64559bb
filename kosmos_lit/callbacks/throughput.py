"""Speed of a run, share of time spent waiting for data, memory, and time left."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.callbacks.ranks import gather_values
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.costs.peaks import Precision, peak_flops
from kosmos_lit.lit import KosmosLit


class Throughput(Callback):
    """Logs speed, data wait and memory every `log_every_n_steps` optimizer steps.

    Rates are means since the last row, over all ranks, without validation, checkpoints and the visual-use gauge.

    tokens_per_second   real positions: image slots count, padding does not
    images_per_second   images
    padding             share of the positions that are padding
    data_wait           share of the time that the loop waited for its loader, on the rank that waited longest
    tflops              operations of the model (`costs.flops`), 10^12 per second and device; attention's causal half
    tflops_full         the same with attention counted in full, as some publish it
    peak_share          tflops / the device's peak at the run's precision; absent for devices without a known peak, as CPUs
    memory/...          peak bytes so far, on the rank with most: on CUDA `allocated` to tensors and `reserved` by PyTorch,
                        on other devices `resident` of the process
    seconds_left        of training to `max_steps`, at the median speed of the last few rows: one slow row does not move it,
                        and a machine that has become slower shows as soon as most of them are slow; the first row, in
                        which kernels are compiled and processes start, does not count

    Only a row of the log and a pause wait for the device.
    """

    def __init__(self, remember: int = 5) -> None:
        """Set how steady the estimate of the time left is.

        Args:
            remember: Rows of the log whose median speed the estimate uses. It follows a lasting change after more than half
                as many rows, and ignores disturbances of fewer.
        """
        self.clock: Callable[[], float] = time.monotonic
        self._step = 0
        self._flops: ModelFlops | None = None
        self._speeds: deque[float] = deque(maxlen=remember)  # seconds a step
        self._is_first_row = True
        self._running = False
        self._paused_waited = 0.0
        self._begin(0, 0.0)

    def _begin(self, step: int, waited: float) -> None:
        """Start the measurement of a row."""
        self._row_step, self._row_waited, self._elapsed = step, waited, 0.0
        self._sums = [0.0] * 5  # real positions, all positions, images, operations, operations with full attention
        self._started = self.clock()

    # ---- what is timed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, KosmosLit)
        self._step = trainer.global_step
        self._flops = ModelFlops(pl_module.config, pl_module.frozen)
        self._flops.training(Work(n_images=1))  # the first count of an image is slow: not in training's time
        self._speeds.clear()
        self._is_first_row = self._running = True
        self._begin(trainer.global_step, _loader_wait(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.pause(trainer)

    def pause(self, trainer: L.Trainer) -> None:
        """Stop the clock until the next micro-batch; the wait for that one counts."""
        if self._running:
            _synchronize(trainer.strategy.root_device)
            self._elapsed += self.clock() - self._started
            self._running, self._paused_waited = False, _loader_wait(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._running:
            # The wait for this batch came before the hook, so the clock starts earlier by it.
            self._started = self.clock() - (_loader_wait(trainer) - self._paused_waited)
            self._running = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: KosmosBatch, batch_idx: int
    ) -> None:
        assert self._flops is not None
        work = Work.of_batch(batch, self._flops.config.decoder.document_attention)
        flops = self._flops.training(work)
        counts = (batch.n_real, batch.tokens.numel(), len(batch.images), flops.total, flops.full)  # sizes on the host
        self._sums = [total + count for total, count in zip(self._sums, counts, strict=True)]
        if trainer.global_step == self._step:
            return  # not the step's last micro-batch
        self._step = trainer.global_step
        if self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self._row(trainer))

    # ---- what is logged

    def _row(self, trainer: L.Trainer) -> dict[str, float]:
        """Return the metrics of a row and start the next, whose time includes writing this one."""
        device, world = trainer.strategy.root_device, trainer.world_size
        _synchronize(device)
        now, waited = self.clock(), _loader_wait(trainer)
        seconds = self._elapsed + (now - self._started if self._running else 0.0)
        memory = _peak_memory(device)
        ranks = gather_values(trainer, [*self._sums, waited - self._row_waited, *memory.values()])  # (ranks, values)
        # Amounts add up over ranks; wait and memory are those of the worst rank.
        real, positions, images, flops, flops_full = ranks[:, :5].sum(0).tolist()
        longest_wait, *peak_bytes = ranks[:, 5:].amax(0).tolist()
        metrics = {
            "tokens_per_second": real / seconds,
            "images_per_second": images / seconds,
            "padding": 1 - real / positions,
            "data_wait": longest_wait / seconds,
            "tflops": flops / seconds / world / 1e12,
            "tflops_full": flops_full / seconds / world / 1e12,
        } | {f"memory/{name}": size for name, size in zip(memory, peak_bytes, strict=True)}
        if (peak := _peak_flops(trainer)) is not None:
            metrics["peak_share"] = flops / seconds / world / peak
        speed = seconds / (self._step - self._row_step)  # seconds a step
        if self._is_first_row:
            self._is_first_row = False
        else:
            self._speeds.append(speed)
        if trainer.max_steps > 0:
            # The lower median: the mean of a usual and a disturbed row would be the speed of neither.
            metrics["seconds_left"] = statistics.median_low(self._speeds or [speed]) * (trainer.max_steps - self._step)
        self._begin(self._step, waited)
        self._started = now
        return metrics


def _synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that the clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process in bytes, by kind."""
    if device.type == "cuda":
        return {
            "allocated": float(torch.cuda.max_memory_allocated(device)),
            "reserved": float(torch.cuda.max_memory_reserved(device)),
        }
    if sys.platform == "win32":
        return {}  # its standard library has no `resource`
    import resource

    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"resident": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def _peak_flops(trainer: L.Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    precision = matmul_precision(str(trainer.precision))
    return None if precision is None else peak_flops(torch.cuda.get_device_name(device), precision)


def matmul_precision(precision: str) -> Precision | None:
    """Return the precision of a CUDA device's matrix products under a trainer's; None where no peak is known."""
    if precision.startswith("32"):
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    kinds: dict[str, Precision] = {"bf16": "bf16", "16": "fp16"}
    return kinds.get(precision.split("-")[0])


def _loader_wait(trainer: L.Trainer) -> float:
    """Return the seconds that the loop has waited for its loader so far."""
    return float(getattr(trainer.train_dataloader, "waited_seconds", 0.0))
