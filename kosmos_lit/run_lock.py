"""One run at a time in a folder: a file says which process writes there, and that it is alive."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil

from kosmos_lit.errors import UserError

NAME = "run.lock"
BEAT = 20.0
"""Seconds between two signs of life."""
STALE = 180.0
"""Seconds without a sign of life after which a holder on another machine counts as dead."""


class RunLock:
    """The lock of a run's folder, held from `acquire` to `release`; a thread renews its sign of life.

    A process that was killed leaves the file. The next one takes it over if the holder is known to be dead: a process of
    this machine that is gone, an earlier start of the same Slurm job, or one without a sign of life for three minutes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock. Raises: UserError if another run holds it, or the folder cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._created():
                self._remove_if_stale()
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {self.path.parent}: {error.strerror}") from error
        self._ends.clear()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._thread is None:
            return
        self._ends.set()
        self._thread.join()
        self._thread = None
        with suppress(OSError):
            if self._holder() == _identity():
                self.path.unlink()

    def _created(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(_identity(), file)
        return True

    def _remove_if_stale(self) -> None:
        """Remove another's file. Raises: UserError if its run may be alive."""
        try:
            holder, age = self._holder(), self._age()
        except FileNotFoundError:
            return  # given back in between
        own = _identity()
        # A file without content was left by a process that was killed, or is about to be written.
        is_dead = bool(holder) and (
            (holder["host"] == own["host"] and not _is_alive(holder["pid"], holder["started"]))
            or (own["job"] is not None and holder["job"] == own["job"] and holder["restarts"] != own["restarts"])
        )
        if not is_dead and age < STALE:
            what = f"process {holder['pid']} on {holder['host'].split()[0]}" if holder else "a process that starts now"
            job = f" (Slurm job {holder['job']})" if holder and holder["job"] else ""
            raise UserError(
                f"another run writes to {self.path.parent}: {what}{job}, last seen {age:.0f} s ago. Choose another "
                f"--trainer.default_root_dir, or end that run; without a sign of life for {STALE:.0f} s it counts as dead"
            )
        # Taken away, then looked at: another process that saw the dead one's file may have put its own there meanwhile.
        taken = self._beside()
        with suppress(FileNotFoundError):
            os.rename(self.path, taken)
            if self._holder(taken) != holder:
                with suppress(FileExistsError):
                    os.link(taken, self.path)
            taken.unlink()

    def _beside(self) -> Path:
        """Return an unused path beside the file."""
        return self.path.with_name(f".{NAME}.{token_hex(4)}.tmp")

    def _holder(self, path: Path | None = None) -> dict[str, Any]:
        """Return who has the file, empty if it does not say."""
        try:
            content = json.loads((path or self.path).read_text(encoding="utf-8"))
        except ValueError:
            return {}
        complete = isinstance(content, dict) and content.keys() == _identity().keys()
        return content if complete else {}

    def _age(self) -> float:
        """Return seconds since the last sign of life, by the clock of the folder's own file system."""
        probe = self._beside()
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ends.wait(BEAT):
            with suppress(OSError):  # a file server that is away for a while
                os.utime(self.path)


def _identity() -> dict[str, Any]:
    # Containers of one machine may have processes of equal numbers.
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {
        "host": f"{socket.gethostname()} {space}".strip(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _is_alive(pid: int, started: float) -> bool:
    """Return whether a process runs and is the one that had the number then."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started) < 1.0
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
