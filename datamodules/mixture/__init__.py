"""Which source a row comes from: ratios and weights to a schedule, and what of it a checkpoint holds."""

from datamodules.mixture.mixture import Mixture, SourceMixture, SourceMixtureStage, Stage
from datamodules.mixture.schedule import MixtureSchedule

__all__ = ["Mixture", "MixtureSchedule", "SourceMixture", "SourceMixtureStage", "Stage"]
