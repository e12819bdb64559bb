"""`plan` says what a run will do, and everything that stands in its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.module import MixtureData
from kosmos_lit.checkpoint import load_checkpoint
from kosmos_lit.cli import main
from kosmos_lit.cli.plan import describe_run
from kosmos_lit.cli.trainer import DataCLI
from kosmos_lit.costs.flops import ModelFlops, Work
from kosmos_lit.errors import UserError
from kosmos_lit.preflight.devices import parse_bytes
from tests.cli_runs import tiny_run

CONFIGS = Path(__file__).parents[3] / "configs"
PAPER = ("-c", str(CONFIGS / "kosmos1.yaml"), "--data.tokenizer.path=no/such/tokenizer", "--data.micro_batch_rows=1")
SMALL = (
    *PAPER,
    "--model.kosmos.decoder.n_layers=1",
    "--model.kosmos.vision.architecture=tests/configs/tiny_vision.json",
    "--model.kosmos.vision.pretrained=null",
    "--model.kosmos.vision.image_size=28",
    "--model.kosmos.decoder.compile=false",
)
"""The paper's run of a model whose memory is estimated in a second."""
LONGER = ("--trainer.max_steps=61", "--model.optimizer.total_steps=61")
COUNTING = '--trainer.callbacks+={"class_path": "tests.recording_callbacks.CountTrainingData"}'


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's run wants 330 GB of checkpoints, which the machine that tests need not have."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**15})())


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the figures of a plan."""
    capsys.readouterr()
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


# ---- what is read


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> dict[str, int]:
    """What 61 steps of the small run read, as its batches count it: several epochs of one source, parts of one of others."""
    folder = tmp_path_factory.mktemp("read")
    assert main(tiny_run("fit", folder, tiny_world, *LONGER, COUNTING)) == 0
    counts: dict[str, int] = json.loads((folder / "training_data.json").read_text(encoding="utf-8"))
    return counts


def test_a_run_reads_what_was_planned(
    read: dict[str, int], tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny_run("plan", tmp_path, tiny_world, *LONGER)[1:]

    code, plan = planned(capsys, *arguments)

    assert (code, plan["exact"], plan["steps"]) == (0, True, 61)
    names = ("rows", "positions", "targets", "images")
    assert {f"{s['name']}.{n}": s[n] for s in plan["sources"] for n in names} == read


def test_epochs_are_those_of_the_stream(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_run("plan", tmp_path, tiny_world, *LONGER)[1:]
    data = DataCLI(arguments).datamodule
    assert isinstance(data, MixtureData)
    data.open()
    rows = [data.stream().schedule.locate(n) for n in range(61 * 4)]
    longest = {at: max(number for source, number in rows if source == at) + 1 for at in range(3)}

    _, plan = planned(capsys, *arguments)

    expected = [longest[at] / data.prepared[name].train.plan.n_rows for at, name in enumerate(data.kinds)]
    assert [s["epochs"] for s in plan["sources"]] == pytest.approx(expected)


def test_operations_are_those_of_the_documents(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_run("plan", tmp_path, tiny_world)[1:]
    run = describe_run(arguments)
    assert run.data is not None
    assert run.kosmos is not None
    stream, work = run.data.stream(), Work()
    for number in range(6 * 4):
        row = stream.row(number)
        work += Work.of_documents([d.length for d in row.segments], int((row.targets >= 0).sum()), len(row.images))

    _, plan = planned(capsys, *arguments)

    # Lengths of documents are the mean of all the source's rows, and attention is a small part.
    assert plan["flops_per_step"]["total"] == pytest.approx(ModelFlops(run.kosmos).training(work).total / 6, rel=0.01)


def test_training_ends_with_the_sources(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = str(tiny_world / "index" / "text")
    code, plan = planned(
        capsys,
        "-c",
        "tests/configs/tiny.yaml",
        "--data=datamodules.MixtureData",
        "--trainer.max_steps=5000",
        f"--data.tokenizer.path={tiny_world / 'tokenizer'}",
        "--data.text.format=jsonl",
        f"--data.text.index={index}",
        f"--data.text.input=[{tiny_world / 'text-*.jsonl.zst'}]",
        "--data.text.max_epochs=2",
        "--data.text.val_share=0.05",
        f"--trainer.default_root_dir={tmp_path}",
        "--data.seq_len=128",
        "--data.global_batch_rows=4",
    )

    assert code == 1
    assert plan["sources"][0]["epochs"] <= 2 < plan["sources"][0]["epochs"] + 4 / 10
    assert any("source text would be read more than 2 times" in p for p in plan["problems"])


# ---- what it takes


def test_the_papers_run_is_planned_without_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, *PAPER, "--devices=8")

    assert code == 0
    assert sum(p["total"] for p in plan["parameters"]) == 1_662_375_936
    assert sum(p["trained"] for p in plan["parameters"]) == 1_371_794_432
    assert not plan["exact"]
    # 300,000 steps of 576 rows of 2,048 positions; 5 : 5 : 2
    assert sum(s["positions"] for s in plan["sources"]) == pytest.approx(300_000 * 576 * 2048, rel=1e-6)
    assert [s["rows"] for s in plan["sources"]] == [72_000_000, 72_000_000, 28_800_000]
    # 10.90 PFLOP for 1.2 M positions, worked out on paper with latents counted and supervised positions alone in the head
    assert plan["flops_per_step"]["total"] / (576 * 2048) == pytest.approx(10.90e15 / 1.2e6, rel=0.03)
    assert plan["run_seconds"] == pytest.approx(plan["flops_per_step"]["total"] * 300_000 / (0.4 * 989.4e12 * 8))


def test_a_checkpoint_is_as_large_as_planned(trained: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plan = planned(capsys, *tiny_run("plan", trained, tiny_world)[1:])

    written = sorted((trained / "checkpoints").glob("*.ckpt"))
    checkpoint = load_checkpoint(written[-1])
    held = tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]])
    # beside the optimizer's count of steps for each parameter
    assert plan["disk"]["checkpoint"] == pytest.approx(sum(t.numel() * t.element_size() for t in held), rel=0.002)
    assert plan["disk"]["n_checkpoints"] == len(written)


def tensors(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return [tensor for value in inside for tensor in tensors(value)]


# ---- what stands in its way


MISTAKES = {
    "--model.kosmos.decoder.n_heads=33": "dim 2048 is not a multiple of n_heads 33",
    "--model.kosmos.decoder.dropout_rate=2": "dropout_rate must lie in [0, 1), got 2.0",
    "--data.seq_len=4096": "data.seq_len is 4096, but model.kosmos.decoder.max_seq_len is 2048",
    "--model.kosmos.decoder.vocab_size=64000": "has 64,007 ids, but model.kosmos.decoder.vocab_size is 64,000",
    "--data.global_batch_rows=575": "575 does not divide into 7 ranks x 1 micro_batch_rows; these would: "
    "global_batch_rows 574 or 581; 5 or 23 ranks",
    "--model.optimizer.warmup_steps=300000": "warmup_steps is 300,000, but the learning rate is to reach 0 at step 300,000",
    "--trainer.val_check_interval=400000": "val_check_interval is 400,000, but the run has 300,000 steps",
    "--trainer.accumulate_grad_batches=3": "accumulate_grad_batches is 3, but it follows from the data's numbers",
    "--trainer.gradient_clip_algorithm=value": "only norm is supported, got value",
    "--data.n_latents=32": "--data.n_latents cannot be set: it follows from model.kosmos.connector.n_latents",
}


def test_all_contradictions_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, *PAPER, "--devices=7", *MISTAKES)

    assert code == 1
    for message in MISTAKES.values():
        assert any(message in problem for problem in plan["problems"]), message
    assert len(plan["problems"]) == len(MISTAKES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.precision=16-mixed"], "float16 with loss scaling is not supported"),
        (["--device=v100-32"], "precision is bf16-mixed, but a v100-32 has no bfloat16"),
        (["--model.optimizer.total_steps=1000"], "the last 299,000 steps would learn at a rate of 0"),
        (["--model.freeze=[decoder.nothing]"], "no parameter is named 'decoder.nothing'"),
        (["--trainer.strategy=fsdp"], "fsdp does not know this model's units; use -c configs/trainer/fsdp.yaml"),
        (["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"], "FSDPStrategy does not know this model's units"),
        (["--trainer.strategy=fdsp"], "there is no fdsp; use -c configs/trainer/ddp.yaml"),
        (["--model.kosmos.decoder.fp8=true", "--trainer.accelerator=cpu"], "decoder.fp8 needs a CUDA device"),
        (["--model.kosmos.decoder.fp8=rowwise", "--device=a100-80"], "a100-80 multiplies no 8-bit floats"),
        (["--model.kosmos.decoder.fp8=tensorwise", "--trainer.precision=32-true"], "fp8 goes with trainer.precision bf16"),
        (["--model.kosmos.decoder.attention_kernel=flex"], "flex has no dropout on attention weights"),
        (["--model.kosmos.decoder.attention_kernel=cudnn"], "cudnn "),
    ],
)
def test_a_contradiction_is_found(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, *SMALL, *arguments)

    assert code == 1
    assert [p for p in plan["problems"] if message in p], plan["problems"]


def test_products_in_8_bits_are_estimated_at_their_own_peak(capsys: pytest.CaptureFixture[str]) -> None:
    values = ("none", "rowwise", "tensorwise")
    plans = [planned(capsys, *SMALL, f"--model.kosmos.decoder.fp8={value}")[1] for value in values]

    seconds = [plan["step_seconds"] for plan in plans]
    blocks = plans[0]["flops_per_step"]["blocks"] / plans[0]["flops_per_step"]["total"]
    # An H100 multiplies twice as fast in 8 bits; attention, vocabulary and tower stay in 16.
    assert seconds[1] / seconds[0] == pytest.approx(1 - blocks / 2, rel=1e-3)
    assert seconds[2] == seconds[1]


def test_a_device_that_is_too_small_comes_with_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, *SMALL, "--data.micro_batch_rows=16", "--memory=6GB", "--peak=989")

    assert code == 1
    (problem,) = plan["problems"]
    assert "a step needs" in problem
    assert "of each device, which has 6.0 GB" in problem
    assert "what would fit: micro_batch_rows" in problem


def test_a_disk_that_is_too_small_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())

    code, plan = planned(capsys, *tiny_run("plan", tmp_path, tiny_world)[1:])

    assert code == 1
    assert "keep fewer (Checkpoints.keep)" in plan["problems"][0]


# ---- how it is called


def test_a_plan_is_a_page_with_all_of_it(tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_run("plan", tmp_path, tiny_world), "--peak", "0.1"]) == 0

    page = capsys.readouterr().out
    for name in ("parameters", "devices", "step", "run", "reads", "operations", "time", "memory", "disk"):
        assert f"\n{name}" in f"\n{page}".replace("\n  ", "\n"), name
    assert max(len(line) for line in page.splitlines()) <= 125


def test_devices_and_nodes_win_over_the_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    _, plan = planned(capsys, *SMALL, "-c", str(CONFIGS / "trainer" / "ddp.yaml"), "--devices=4", "--nodes=3")

    assert plan["world_size"] == 12
    assert plan["n_micro_batches"] == 48
    assert "gradient buckets" not in plan["memory_per_device"]["parts"]  # the gradients lie in them


def test_what_a_step_sends_is_planned_for_each_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    def sent(overlay: str, *more: str) -> dict[str, float]:
        path = str(CONFIGS / "trainer" / f"{overlay}.yaml")
        _, plan = planned(capsys, *SMALL, "-c", path, "--devices=4", "--nodes=2", *more)
        communication: dict[str, float] = plan["communication"]
        return communication

    ddp, fsdp, fsdp1, hsdp = (sent(overlay) for overlay in ("ddp", "fsdp", "fsdp1", "hsdp"))

    assert ddp["within_node"] == fsdp["within_node"] == 0
    assert 0 < hsdp["between_nodes"] < ddp["between_nodes"] < fsdp["between_nodes"] < fsdp1["between_nodes"]
    assert hsdp["within_node"] > 0
    assert sent("ddp", "--network_gb_s=5")["seconds"] == pytest.approx(10 * ddp["seconds"])
    assert sent("hsdp", "--node_gb_s=1")["seconds"] > 10 * hsdp["seconds"]


def test_a_page_names_bandwidths_and_what_computing_cannot_hide(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = str(CONFIGS / "trainer" / "ddp.yaml")
    main(["plan", *SMALL, "-c", overlay, "--devices=2"])
    page = capsys.readouterr().out
    main(["plan", *SMALL, "-c", overlay, "--devices=2", "--memory=80GB", "--peak=900"])
    unknown = capsys.readouterr().out

    assert "communication each device sends " in page
    assert " s at 450 and 50 GB/s in a node and between nodes, of which computing can hide all but " in page
    assert "communication unknown: give bandwidths with --node_gb_s and --network_gb_s" in unknown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=abacus"], "no device 'abacus'"),
        (["--peak_share=1.5"], "--peak_share must lie in"),
        (["--memory=much"], "--memory much is no size"),
        (["--node_gb_s=0"], "--node_gb_s must be positive, in GB/s, got 0"),
        (["--network_gb_s=-3"], "--network_gb_s must be positive, in GB/s, got -3"),
        (["--devices=0"], "--devices must be positive, got 0"),
        (["--trainer.max_stepss=3"], "max_stepss"),
    ],
)
def test_a_mistake_on_the_command_line_is_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *PAPER, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("0.5tb", 5e11), ("24", 24e9)])
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    assert parse_bytes(text) == size


def test_a_plan_prepares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = tmp_path / "world"

    code, plan = planned(capsys, *tiny_run("plan", tmp_path, world)[1:])

    assert (code, plan["exact"]) == (0, False)
    assert not world.exists()
    assert [s["epochs"] for s in plan["sources"]] == [None] * 3
    assert "not prepared yet" in plan["notes"][0]


def test_a_run_that_no_device_holds_ends_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kosmos_lit.checks.memory.device_memory", lambda _: 1000.0)

    assert main(tiny_run("fit", tmp_path, tiny_world)) == 2

    assert "weights, gradients and optimizer state take" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_bytes("0GB")
