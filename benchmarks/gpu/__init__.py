"""Measurements on a GPU within a deadline, most telling first, each with both sides of a ratio in one run."""
