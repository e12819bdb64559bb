"""What a weight file from a stranger may hold."""

from __future__ import annotations

from pathlib import Path


class MaliciousPickle:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")
