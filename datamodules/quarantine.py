"""The ledger of bad samples: where each lies, what is wrong with it, and how many of them a run puts up with.

It lists broken records, while a corpus is prepared, and while a run reads it images that cannot be decoded and documents
on the blocklist. Either stays in its row without targets, so that no other sample moves (see `collate`).
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
"""Name of the file, beside an index and in a run's folder."""
MAX_DETAIL = 500
"""Characters of what a reader said that a line keeps."""
BEGIN = b'{"source": "'
"""How each line of a ledger begins."""
MIN_IMAGES = 200
"""Images of a source that a process looks at before it judges the share of bad ones."""
MAX_IN_A_ROW = 1000
"""Bad images of a source one after another that stop a run whose share of them is still small: a disk went away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSample:
    """A sample that cannot be used; one JSON line of a ledger, which leaves out what is None."""

    source: str
    """Name of the source in the run's config; the format where it is prepared."""
    shard: str
    """The file's path as the index keeps it."""
    key: str
    """What finds it there: a tar key, a URL, `line 17`."""
    reason: str
    """A short phrase for counting."""
    detail: str = ""
    """What the reader said."""
    row: int | None = None
    """Row of the stream that it was read for; None: it was met while the corpus was prepared."""
    split: str | None = None
    """`val` for a row of the held-out stream; None: training."""
    offset: int | None = None
    """First byte of the image in the shard, in a crawl that of its record; None: the sample as a whole."""

    def to_line(self) -> bytes:
        """Return one line of UTF-8 with its end, and `detail` cut to MAX_DETAIL."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        line = json.dumps(fields | {"detail": self.detail[:MAX_DETAIL]}, ensure_ascii=False)
        return line.encode("utf-8", "backslashreplace") + b"\n"  # names out of tars may hold halves of characters


class Ledger:
    """A file of bad samples that any number of processes and ranks append to; it is made with the first of them.

    Nothing is kept open or in memory: it can be forked, pickled and moved away while a run goes on. Appending is one write
    in append mode, which local file systems and Lustre do not mix up; NFS may, between machines: give each node its own.
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
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                n_written = os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"the ledger of bad samples {self.path} cannot be written: {error}") from error
        if n_written != len(line):
            raise UserError(f"the ledger of bad samples {self.path} cannot be written: the disk is full")


def read_ledger(path: str | Path) -> Iterator[BadSample]:
    """Yield the samples of a ledger, each once: one met again in another row or epoch is the same.

    A line that broke off, as a killed writer or a full disk leaves it, is passed over; what was appended to it later is
    not. It holds a hash of each sample in memory.

    Raises: UserError if a line is no bad sample.
    """
    seen: set[int] = set()
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            head, *rest = line.split(BEGIN)  # quotes are escaped inside of a sample
            if not BEGIN.startswith(head.strip()):
                raise UserError(f"{path}, line {number}: no bad sample")
            for sample in filter(None, map(_parsed, rest)):
                same = hash((sample.source, sample.shard, sample.key, sample.reason, sample.offset))
                if same not in seen:
                    seen.add(same)
                    yield sample


def _parsed(rest: bytes) -> BadSample | None:
    """Return the sample of a line behind its `BEGIN`; None: it broke off."""
    try:
        return BadSample(**json.loads(BEGIN + rest))
    except ValueError:
        return None


class Budget:
    """What a process met of one source's images, and when that is too bad to go on."""

    def __init__(self, source: str, max_bad_share: float, ledger: Ledger | None = None) -> None:
        """Take the source's name and limit, and the ledger that the message shall name."""
        self.source, self.max_bad_share, self.ledger = source, max_bad_share, ledger
        self.n_read = self.n_in_a_row = 0
        self.reasons: Counter[str] = Counter()

    @property
    def n_bad(self) -> int:
        """Bad images so far."""
        return self.reasons.total()

    def good(self) -> None:
        """Count an image that can be used."""
        self.n_read += 1
        self.n_in_a_row = 0

    def bad(self, reason: str, place: str) -> None:
        """Count an image that cannot be used.

        Raises: UserError if, after `MIN_IMAGES`, more than the share was bad, or the last `MAX_IN_A_ROW` all were.
        """
        self.n_read += 1
        self.n_in_a_row += 1
        self.reasons[reason] += 1
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
