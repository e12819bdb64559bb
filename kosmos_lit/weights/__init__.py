"""Import and export: checkpoints, model folders, transformers' Kosmos-2, fairseq, CLIP."""
