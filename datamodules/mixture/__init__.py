"""Which source a row comes from: ratios and weights to a schedule, and what of it a checkpoint keeps."""

from datamodules.mixture.mixture import Mixture, MixtureSchedule, SourceMixture, SourceMixtureStage, Stage

__all__ = ["Mixture", "MixtureSchedule", "SourceMixture", "SourceMixtureStage", "Stage"]
