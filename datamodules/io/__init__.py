"""Input files, processes, locks and hashes."""
