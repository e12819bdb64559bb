"""What is measured on a GPU, in order, and the seconds that each part is expected to take. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One measurement: it is skipped if it would not fit into the time left, and cut if it takes much longer."""

    function: str
    """`module:function`, imported by the process that measures, so that a missing library costs this part alone."""
    seconds: float
    """Expected on one H200; of `steps` those of its first run. Estimates, until a GPU has measured them (`took, s`)."""
    what: str

    @property
    def limit(self) -> float:
        """Return the seconds after which the part is cut."""
        return 30 + 2 * self.seconds


_PACKAGE = "benchmarks.gpu."
PARTS = {
    "rates": Part(_PACKAGE + "components:rates", 8, "yardsticks: a large bf16 product (MM) and a copy; does xformers run?"),
    "tests": Part(_PACKAGE + "suite:gpu_tests", 60, "every test marked gpu"),
    "steps": Part(_PACKAGE + "steps:real_steps", 110, "20 steps of kosmos1.yaml on drawn data: xformers, FSDP2, then DDP"),
    "text": Part(_PACKAGE + "whole_model:text", 90, "P1: rows of text, and G3: over published rates"),
    "mixture": Part(_PACKAGE + "whole_model:mixture", 55, "P2: the three corpora with their images"),
    "decode": Part(_PACKAGE + "whole_model:decode", 45, "G10: generation over the bandwidth's bound"),
    "loss": Part(_PACKAGE + "components:loss", 40, "G7: projection to the vocabulary, and cross-entropy"),
    "clip": Part(_PACKAGE + "components:clip", 35, "G8: the image tower as training runs it"),
    "attention": Part(_PACKAGE + "components:attention", 50, "G6: attention kernels forward and backward"),
    "block": Part(_PACKAGE + "components:block", 60, "G5: what dropout, xPos and sub-LN cost"),
    "fp8": Part(_PACKAGE + "whole_model:fp8", 60, "G1: rows of text, the layers' matrices in 8 bits"),
    "released": Part(_PACKAGE + "whole_model:released", 60, "G4: over a loop like the released one"),
    "trainer": Part(_PACKAGE + "loops:trainer", 90, "G11: Lightning and FSDP2 over a bare loop"),
    "loader": Part(_PACKAGE + "loops:loader", 90, "G9: the loader on four processes"),
}
"""Every part, most telling first."""
