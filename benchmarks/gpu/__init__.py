"""Measurements on a GPU: the components of a step, then performance goals, each with both sides of a ratio in one run."""
