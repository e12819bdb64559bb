"""The embedded world: corpora and evaluation sets that are drawn, not downloaded, in the formats of real ones.

Everything depends on a seed. A share of the combinations (a small red circle at the top left; three blue stars) is held out:
no image and no sentence of the training corpora contains them, even as a part of a larger scene.
"""
