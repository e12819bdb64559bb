"""The embedded world: scenes that are drawn, not downloaded, written in the formats in which real corpora come.

Everything follows from a seed. A part of the combinations (a small red circle at the top left; three blue stars) is held
out: neither an image nor a sentence of the training corpora has them, whatever else is in the image.
"""
