"""Tensors in files of any origin, and the names that other programs give to a Kosmos's tensors."""
