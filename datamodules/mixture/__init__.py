"""Which source a row comes from: ratios and weights to a schedule, and what of it a checkpoint keeps."""

from datamodules.mixture.mixture import Blend, BlendStage, Mixture, Relay, Stage

__all__ = ["Blend", "BlendStage", "Mixture", "Relay", "Stage"]
