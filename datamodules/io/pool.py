"""The same work for many shards, in processes, under one progress bar."""

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

from tqdm import tqdm

T = TypeVar("T")
Progress = Callable[[int], None]
"""Takes how many more documents or images are done."""
AHEAD = 4
"""Tasks that are handed out for each process: waiting for all of 100,000 at a time would take longer than their work."""


@contextmanager
def starting_workers() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C: this one hears it, and ends them in order."""
    if threading.current_thread() is not threading.main_thread():
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
    """End this process when the one that started it is killed: nobody would hold the folder's lock for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Callable[[T, Progress], None], task: T) -> None:
    job(task, _report_progress)


def run_all(
    job: Callable[[T, Progress], None], tasks: Sequence[T], workers: int, title: str, unit: str, of: str = "shard"
) -> None:
    """Do `job` for each task, in processes if there is more than one to do, with a bar over tasks.

    The first error ends it: tasks that run then may finish, the others are not begun.

    Args:
        job: a module's function of a task and of where to report how many more units are done.
        tasks: one per shard, or whatever is done on its own.
        workers: most processes.
        title: what the bar says.
        unit: what is counted beside tasks.
        of: what a task is.
    """
    if not tasks:
        return
    seen = 0
    with tqdm(total=len(tasks), desc=title, unit=of, disable=None) as bar:

        def progress(n: int) -> None:
            nonlocal seen
            seen += n
            bar.set_postfix_str(f"{seen:,} {unit}", refresh=False)
            bar.update(0)

        if min(workers, len(tasks)) <= 1:
            for task in tasks:
                job(task, progress)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        queue = context.SimpleQueue()
        following, n_ahead = iter(tasks), AHEAD * workers
        running: set[Future[None]]
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (queue,)) as pool:
            with starting_workers():
                running = {pool.submit(_work, job, task) for task in islice(following, n_ahead)}
            try:
                while running:
                    done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not queue.empty():
                        progress(queue.get())
                    for future in done:
                        future.result()
                        bar.update()
                    with starting_workers():
                        running |= {pool.submit(_work, job, task) for task in islice(following, n_ahead - len(running))}
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what runs may finish: the lock is held until then
                raise
