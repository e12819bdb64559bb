"""Callbacks: log, progress, throughput, checkpoints, predictions, evaluation, the visual-use gauge."""

from kosmos_lit.callbacks.caption_report import CaptionReport
from kosmos_lit.callbacks.checkpoints import Checkpoints
from kosmos_lit.callbacks.evaluation import EvaluateTasks
from kosmos_lit.callbacks.garbage import GarbageCollection
from kosmos_lit.callbacks.loss_spikes import LossSpikes
from kosmos_lit.callbacks.predictions import Predictions
from kosmos_lit.callbacks.progress import Progress
from kosmos_lit.callbacks.step_log import StepLog
from kosmos_lit.callbacks.throughput import Throughput
from kosmos_lit.callbacks.visual_use import VisualUse
from kosmos_lit.callbacks.watchdog import Watchdog

__all__ = [
    "CaptionReport",
    "Checkpoints",
    "EvaluateTasks",
    "GarbageCollection",
    "LossSpikes",
    "Predictions",
    "Progress",
    "StepLog",
    "Throughput",
    "VisualUse",
    "Watchdog",
]
