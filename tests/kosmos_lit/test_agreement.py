"""Several ranks (processes over gloo) notice where one of them has read something else."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kosmos_lit.agreement import check_same, code_version, from_rank_zero, short_hash
from kosmos_lit.checkpoint import load_agreed
from kosmos_lit.errors import UserError
from tests.kosmos_lit.test_checkpoint import checkpoint, flip, save

RANKS = 3


def _run(rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        results.put((rank, function(rank, *arguments)))
    except SystemExit as end:
        results.put((rank, f"exit {end.code}"))
    except UserError as error:
        results.put((rank, f"error: {error}"))
    finally:
        dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function of the rank returns on each of three ranks, or how it ends there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, port, function, arguments, results), daemon=True) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    table = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    return [table[rank] for rank in range(RANKS)]


def same_but(rank: int, other: int | None) -> str:
    check_same({"code": "1.0", "data": "other" if rank == other else "one"}, "Mend it")
    return "goes on"


def test_ranks_with_the_same_values_go_on() -> None:
    assert on_ranks(same_but, None) == ["goes on"] * RANKS


@pytest.mark.parametrize(
    ("other", "groups"), [(1, "one on ranks 0, 2; other on rank 1"), (0, "other on rank 0; one on ranks 1, 2")]
)
def test_one_message_says_which_ranks_differ_and_all_end(other: int, groups: str) -> None:
    message = f"error: data differs among ranks: {groups}. Mend it"
    assert on_ranks(same_but, other) == [message, "exit 2", "exit 2"]


def loaded(rank: int, paths: list[str]) -> int:
    return load_agreed(paths[rank], mmap=False)["global_step"]


def test_all_ranks_load_the_checkpoint_that_rank_0_names(tmp_path: Path) -> None:
    older, newer = save(tmp_path / "a.ckpt", checkpoint(7)), save(tmp_path / "b.ckpt", checkpoint(11))
    assert on_ranks(loaded, [str(older), str(newer), str(newer)]) == [7, 7, 7]


def test_a_damaged_checkpoint_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", checkpoint(7, weights=torch.arange(1001)))
    flip(path, path.stat().st_size // 2)
    results = on_ranks(loaded, [str(path)] * RANKS)
    assert all("a.ckpt is no checkpoint that can be read safely: Bad CRC-32" in result for result in results)


def seen_otherwise(rank: int, path: str, other: str) -> int:
    from kosmos_lit import checkpoint as checkpoints

    if rank == 2:  # another machine's file of this name
        hashed = checkpoints.content_hash
        checkpoints.content_hash = lambda _: hashed(other)
    return load_agreed(path, mmap=False)["global_step"]


def test_a_rank_that_reads_another_file_of_the_name_ends_all(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a.ckpt", checkpoint(7)), save(tmp_path / "b.ckpt", checkpoint(11))
    first, *others = on_ranks(seen_otherwise, str(one), str(other))
    assert first.startswith(f"error: {one} differs among ranks: ")
    assert first.endswith("on rank 2. Ranks must see one file system: resume when all of them see the same file")
    assert others == ["exit 2", "exit 2"]


def test_one_process_agrees_with_itself() -> None:
    check_same({"code": "1.0"}, "?")
    assert from_rank_zero(7) == 7


def test_hashes_are_of_the_values_and_not_of_their_order() -> None:
    assert short_hash({"a": 1, "b": [2, 3.5]}) == short_hash({"b": [2, 3.5], "a": 1}) != short_hash({"a": 1, "b": [3.5, 2]})


def test_the_code_version_changes_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kosmos_lit import agreement

    for folder in ("kosmos_lit", "datamodules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "kosmos_lit" / "agreement.py"))
    versions = []
    for content in ("1", "1", "2"):
        (tmp_path / "datamodules" / "a.py").write_text(content)
        code_version.cache_clear()
        versions.append(code_version())
    code_version.cache_clear()
    assert versions[0] == versions[1] != versions[2]
