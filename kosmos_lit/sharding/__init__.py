"""Fully sharded training: strategies for Lightning, and the shards of a module's tensors."""
