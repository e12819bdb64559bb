"""The ledger of bad samples: their places and reasons, and the share of them that a run tolerates.

Preparing a corpus lists broken records. A run lists images that cannot be decoded and documents on the blocklist; their
documents stay in their rows without targets, so that no other sample moves (see `collate`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kosmos_lit.errors import UserError

LEDGER = "quarantine.jsonl"
"""Name of the file, in an index's folder and in a run's."""
MAX_DETAIL = 500
"""Most characters of an error message in a line."""
BEGIN = b'{"source": "'
"""The beginning of each line."""
MIN_IMAGES = 200
"""Images of a source that a process reads before it checks the share of bad ones."""
MAX_IN_A_ROW = 1000
"""Consecutive bad images of a source that stop a run even if their share is small: a disk has gone away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSample:
    """A sample that cannot be used: one JSON line of a ledger, without the fields that are None."""

    source: str
    """Name of the source in the run's config; while preparing, the format."""
    shard: str
    """The file's path as the index stores it."""
    key: str
    """Identifies it in the shard: a tar key, a URL, `line 17`."""
    reason: str
    """A short phrase to count it under."""
    detail: str = ""
    """The reader's error message."""
    row: int | None = None
    """Row of the stream that it was read for; None: found while the corpus was prepared."""
    split: str | None = None
    """`val` for a row of the held-out stream; None: training."""
    offset: int | None = None
    """First byte of the image in the shard (in a crawl, of its record); None: the sample as a whole."""

    def to_line(self) -> bytes:
        """Return one line of UTF-8 with a newline, and `detail` cut to MAX_DETAIL."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        line = json.dumps(fields | {"detail": self.detail[:MAX_DETAIL]}, ensure_ascii=False)
        return line.encode("utf-8", "backslashreplace") + b"\n"  # names in tars may hold lone surrogates


class Ledger:
    """A file of bad samples to which any number of processes and ranks append; the first sample creates it.

    Nothing is kept open or in memory, so it can be forked, pickled, and moved away during a run. Appending is one write in
    append mode, which is atomic on local file systems and Lustre, but not between machines on NFS: give each node its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, sample: BadSample) -> None:
        """Append a sample.

        Raises: UserError if the file cannot be written.
        """
        line = sample.to_line()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # os.write, not a buffered file, which may divide a line between two writes.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                n_written = os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"the ledger of bad samples {self.path} cannot be written: {error}") from error
        # A disk that fills up takes a part of the line, without an error.
        if n_written != len(line):
            raise UserError(f"the ledger of bad samples {self.path} cannot be written: the disk is full")


def read_ledger(path: str | Path) -> Iterator[BadSample]:
    """Yield the samples of a ledger, each once, even if it was listed again for another row or epoch.

    A truncated line, left by a killed writer or a full disk, is skipped, but not the samples appended to it later. A hash of
    each sample is held in memory.

    Raises: UserError if a line is no bad sample.
    """
    seen: set[int] = set()
    with Path(path).open("rb") as file:
        # A line may hold several samples: a truncated one has no newline, and the next follows it.
        for number, line in enumerate(file, start=1):
            head, *tails = line.split(BEGIN)  # cannot occur inside a sample, where quotes are escaped
            # A truncated line may end inside its beginning, before the next sample.
            if not BEGIN.startswith(head.strip()):
                raise UserError(f"{path}, line {number}: no bad sample")
            for sample in filter(None, map(_parsed, tails)):
                identity = hash((sample.source, sample.shard, sample.key, sample.reason, sample.offset))
                if identity not in seen:
                    seen.add(identity)
                    yield sample


def _parsed(tail: bytes) -> BadSample | None:
    """Return the sample whose line is `BEGIN` and `tail`; None if it is truncated."""
    try:
        return BadSample(**json.loads(BEGIN + tail))
    except ValueError:
        return None


class Budget:
    """Counts one source's images in a process, and raises when too many are bad."""

    def __init__(self, source: str, max_bad_share: float, ledger: Ledger | None = None) -> None:
        """Take the source's name, the share of bad images that it may have, and the ledger to name in the message."""
        self.source, self.max_bad_share, self.ledger = source, max_bad_share, ledger
        self.n_read = self.n_in_a_row = 0
        self.reasons: Counter[str] = Counter()

    @property
    def n_bad(self) -> int:
        """Bad images so far."""
        return self.reasons.total()

    def count_good(self) -> None:
        """Count an image that can be used."""
        self.n_read += 1
        self.n_in_a_row = 0

    def count_bad(self, reason: str, place: str) -> None:
        """Count an image that cannot be used.

        Raises: UserError if after `MIN_IMAGES` a larger share is bad, or if the last `MAX_IN_A_ROW` images are.
        """
        self.n_read += 1
        self.n_in_a_row += 1
        self.reasons[reason] += 1
        # In a small sample, a few bad images are a large share by chance.
        too_many = self.n_read >= MIN_IMAGES and self.n_bad > self.max_bad_share * self.n_read
        if not too_many and self.n_in_a_row < MAX_IN_A_ROW:
            return
        what = (
            f"more than max_bad_share {self.max_bad_share:.1%}"
            if too_many
            else f"the last {self.n_in_a_row:,} of them one after another"
        )
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in self.reasons.most_common())
        listed = f" All are listed in {self.ledger.path}." if self.ledger else ""
        raise UserError(
            f"{self.source}: {self.n_bad:,} of {self.n_read:,} images cannot be used ({self.n_bad / self.n_read:.1%}), "
            f"{what}: {reasons}.{listed} The last one: {place}. Mend the shards and prepare them again, leave them out, "
            f"or raise the source's max_bad_share"
        )
