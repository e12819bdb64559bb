"""Checks before the first training step: device, memory, and attention between documents."""
