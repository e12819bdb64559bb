"""One function applied to many tasks in worker processes, with lines of progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from kosmos_lit import terminal

T = TypeVar("T")
Progress = Callable[[int], None]
"""Takes the number of documents or images done since the last call."""
TASKS_AHEAD = 4
"""Tasks submitted per process: waiting for 100,000 futures at a time would take longer than their work."""


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start processes that ignore Ctrl-C: the parent handles it and ends them in order."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_report_progress: Progress = lambda n: None  # noqa: E731  # set in each worker process


def _start_worker(queue: Any) -> None:
    global _report_progress
    _report_progress = queue.put
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed: the folder's lock, which the parent held, is free then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Callable[[T, Progress], None], task: T) -> None:
    job(task, _report_progress)


def run_all(
    job: Callable[[T, Progress], None], tasks: Sequence[T], workers: int, title: str, unit: str, of: str = "shard"
) -> None:
    """Call `job` for each task, in worker processes unless one is enough, and print how far they are.

    The first error ends it: running tasks may finish, the others do not start.

    Args:
        job: a module-level function of a task and a `Progress`.
        tasks: independent of one another.
        workers: maximum number of processes.
        title: what is done, for the lines of progress.
        unit: name of what `Progress` counts.
        of: name of a task.
    """
    if not tasks:
        return
    n_done, lines = 0, terminal.Progress(title, len(tasks), f"{of}s")

    def progress(n: int) -> None:
        nonlocal n_done
        n_done += n
        lines.note = f"{n_done:,} {unit}, {n_done / max(lines.seconds, 1e-9):,.0f}/s"
        lines.add(0)

    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            job(task, progress)
            lines.add()
    else:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        queue = context.SimpleQueue()
        remaining, n_ahead = iter(tasks), TASKS_AHEAD * workers
        running: set[Future[None]]
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (queue,)) as pool:
            with starting_workers():
                running = {pool.submit(_work, job, task) for task in islice(remaining, n_ahead)}
            try:
                while running:
                    # The timeout lets progress inside of tasks be shown.
                    finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not queue.empty():
                        progress(queue.get())
                    for future in finished:
                        future.result()
                        lines.add()
                    with starting_workers():
                        running |= {pool.submit(_work, job, task) for task in islice(remaining, n_ahead - len(running))}
            except BaseException:
                pool.shutdown(cancel_futures=True)  # running tasks may finish: the lock is held until then
                raise
    lines.end()
