"""The estimate of a step's memory is what the allocators count; an estimate that fails ends nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from kosmos_lit.checks.memory import check_memory, remedies
from kosmos_lit.cli import main
from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, LoraConfig, VisionConfig
from kosmos_lit.costs import memory
from kosmos_lit.costs.allocations import backward, fake_device
from kosmos_lit.costs.compiled import TensorSpec, partition_of
from kosmos_lit.costs.memory import (
    EstimateError,
    Memory,
    MicroBatch,
    Setting,
    bytes_of,
    estimate,
    meta_model,
    training_model,
)
from kosmos_lit.errors import UserError
from kosmos_lit.init_from import freeze
from kosmos_lit.model import Kosmos
from tests.cli_runs import losses, tiny_run

pytestmark = pytest.mark.xdist_group("memory")  # one worker: partitions are cached in it

BATCH = MicroBatch(rows=3, seq_len=211, n_images=5, n_targets=431)
TOWER = {"embed_dim": 96, "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 96, "layers": 3, "head_width": 32}}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tower") / "tower.json"
    path.write_text(json.dumps(TOWER), encoding="utf-8")
    return str(path)


def model(tower: str, *, trainable: Any = "last_block", lora: LoraConfig | None = None, **decoder: Any) -> KosmosConfig:
    """A model wide and long enough for its activations to outweigh what is allocated once."""
    sizes = {"vocab_size": 1013, "dim": 128, "n_layers": 3, "n_heads": 4, "ffn_dim": 384, "max_seq_len": 256}
    return KosmosConfig(
        vision=VisionConfig(architecture=tower, pretrained=None, image_size=56, trainable=trainable),
        connector=ConnectorConfig(n_latents=7, n_heads=4),
        decoder=DecoderConfig(**(sizes | {"loss_chunk": 200} | decoder)),
        lora=lora,
    )


def step(net: Kosmos, setting: Setting) -> None:
    batch = memory.dummy_batch(setting, net.config.vision.image_size)
    compute = memory.AUTOCAST.get(setting.precision)
    with torch.autocast(setting.device, compute, enabled=compute is not None):
        loss, _ = net.loss(batch, 1.0)
    loss.backward()  # type: ignore[no-untyped-call]


def peak_allocated(run: Any) -> int:
    """Return the peak of what this process allocates while `run` runs, as torch's profiler counts it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    current = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        current += size
        peak = max(peak, current)
    return peak


def without_state(estimated: Memory) -> int:
    return estimated.total - estimated.parts["weights"] - estimated.parts["optimizer state"]


CASES: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "the whole tower trains": {"trainable": "all"},
    "the tower is frozen": {"trainable": "none"},
    "adapters": {"lora": LoraConfig(rank=3)},
    "without a second norm": {"norm": "pre"},
    "no dropout": {"dropout_rate": 0.0, "attention_dropout_rate": 0.0},
    "logits all at once": {"loss_chunk": None},
    "all but products recomputed": {"recompute": "selective"},
    "layers recomputed": {"recompute": "full"},
}


IN_FLOAT32 = ("the paper's", "the whole tower trains", "layers recomputed")
"""Without casts fewer tensors are kept, and in the same places."""


@pytest.mark.parametrize(
    ("case", "precision"), [*((case, "bf16-mixed") for case in CASES), *((case, "32-true") for case in IN_FLOAT32)]
)
def test_a_step_allocates_what_was_estimated(tower: str, case: str, precision: str) -> None:
    config, setting = model(tower, **CASES[case]), Setting(batch=BATCH, device="cpu", precision=precision)
    net = Kosmos.create(config).train()
    if precision == "bf16-mixed":
        net.vision.round_frozen(torch.bfloat16)
    step(net, setting)  # allocates tables that stay
    net.zero_grad()

    measured = peak_allocated(lambda: step(net, setting))

    # Measured 0.3 % apart: tables of positions, and the allocator's rounding.
    assert without_state(estimate(config, setting)) == pytest.approx(measured, rel=0.02)


def test_frozen_parts_get_no_gradients_in_an_estimate(tower: str) -> None:
    patterns = ("decoder.layers.0", "connector")
    config, setting = model(tower), Setting(batch=BATCH, device="cpu", freeze=patterns)
    net = Kosmos.create(config).train()
    freeze(net, patterns)
    step(net, setting)
    net.zero_grad()

    assert without_state(estimate(config, setting)) == pytest.approx(peak_allocated(lambda: step(net, setting)), rel=0.02)


class TiedNet(nn.Module):
    """A tied weight, broadcasting, several results, and something recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(7, 7)), nn.Parameter(torch.randn(1, 7))
        self.norm = nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (self.norm(x) @ self.weight * self.scale).split((3, 4), dim=1)
        recomputed: torch.Tensor = checkpoint(lambda y: (y @ self.weight).tanh(), torch.cat([b, a], 1), use_reentrant=False)
        return (x + recomputed).square().sum()


def test_walking_the_graph_gives_the_gradients_of_the_engine() -> None:
    torch.manual_seed(3)
    net, x = TiedNet(), torch.randn(5, 7)
    net(x).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()

    backward([net(x)])

    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


PAPER = Setting(batch=MicroBatch(rows=1, seq_len=2048, n_images=25, n_targets=2048), precision="bf16-mixed")


@pytest.fixture(scope="module")
def small(tower: str) -> KosmosConfig:
    return model(tower, dim=256, n_heads=4, ffn_dim=1024, max_seq_len=2048)


@pytest.fixture(scope="module")
def gpu_estimate(small: KosmosConfig) -> Memory:
    """The estimate of a step, made before any of its partitions is cached."""
    memory._partitions.cache_clear()
    return estimate(small, PAPER)


def test_an_estimate_for_a_gpu_needs_no_gpu(small: KosmosConfig, gpu_estimate: Memory) -> None:
    parts = gpu_estimate.parts

    net = meta_model(small)
    trained = sum(4 * p.numel() for p in net.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in net.decoder.layers.parameters() if p.ndim == 2)
    assert parts["optimizer state"] == 2 * trained
    assert 2 * matrices <= parts["weights in bfloat16"] <= trained / 2


def test_the_towers_frozen_matrices_take_two_bytes_an_element_in_mixed_precision(small: KosmosConfig) -> None:
    exact, mixed = (training_model(small, replace(PAPER, precision=p)).vision for p in ("32-true", "bf16-mixed"))

    matrices = sum(p.numel() for p in exact.frozen_matrices().values())
    assert matrices > 0.6 * sum(p.numel() for p in exact.parameters() if not p.requires_grad)
    assert bytes_of(exact.parameters()) - bytes_of(mixed.parameters()) == 2 * matrices


def test_compiled_or_recomputed_parts_keep_less(small: KosmosConfig, gpu_estimate: Memory) -> None:
    def kept(recompute: Any, *, compiled: bool) -> int:
        decoder = replace(small.decoder, recompute=recompute, compile=compiled)
        return estimate(replace(small, decoder=decoder), PAPER).parts["decoder"]

    eager, compiled = kept("none", compiled=False), gpu_estimate.parts["decoder"]  # on a GPU, compiled is the default

    assert kept("full", compiled=True) < kept("selective", compiled=True) < compiled < 0.8 * eager


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_compiled_parts_in_8_bits_keep_less(small: KosmosConfig, gpu_estimate: Memory, scaling: Any) -> None:
    parts = estimate(replace(small, decoder=replace(small.decoder, fp8=scaling)), PAPER).parts

    # Inputs of products are kept in one byte an element, and the layers' weights in no copy in bfloat16.
    assert parts["decoder"] < gpu_estimate.parts["decoder"]
    assert parts.get("weights in bfloat16", 0) < gpu_estimate.parts["weights in bfloat16"] / 2
    assert parts["weights"] == gpu_estimate.parts["weights"]


def test_a_compiled_chain_keeps_its_inputs_and_the_operand_of_its_product() -> None:
    with fake_device("cpu"):
        x, weight = torch.empty(5, 7, requires_grad=True), torch.empty(7, 7, requires_grad=True)
        partition = partition_of(lambda ts: [torch.tanh(torch.sin(ts[0]) * 2) @ ts[1]], [x, weight])

    assert partition.outputs == [TensorSpec((5, 7), torch.float32)]
    assert partition.kept_inputs == [0, 1]
    assert partition.kept == [TensorSpec((5, 7), torch.float32)]  # of tanh; neither the sine nor its double


def test_gradients_are_resident_with_several_micro_batches(small: KosmosConfig, gpu_estimate: Memory) -> None:
    two = estimate(small, replace(PAPER, n_micro_batches=2))

    trained = sum(4 * p.numel() for p in meta_model(small).parameters() if p.requires_grad)
    assert two.parts["gradients"] == pytest.approx(trained, rel=0.001)
    assert two.total > gpu_estimate.total


def test_gradients_in_ddp_s_buckets_are_counted_once(small: KosmosConfig, gpu_estimate: Memory) -> None:
    trained = sum(4 * p.numel() for p in meta_model(small).parameters() if p.requires_grad)
    ddp = replace(PAPER, strategy="ddp", world_size=2, n_micro_batches=2)
    copies, views = estimate(small, ddp), estimate(small, replace(ddp, has_bucket_views=True))
    one_micro_batch = estimate(small, replace(ddp, has_bucket_views=True, n_micro_batches=1))

    assert copies.parts["gradient buckets"] == trained
    assert copies.total - views.total == trained
    assert one_micro_batch == views  # the buckets exist all the time


def test_a_rank_holds_its_shard_of_the_state(small: KosmosConfig, gpu_estimate: Memory) -> None:
    one, sharded = gpu_estimate, estimate(small, replace(PAPER, strategy="fsdp", world_size=4))

    assert sharded.parts["optimizer state"] == pytest.approx(one.parts["optimizer state"] / 4, rel=0.001)
    frozen = bytes_of(p for p in training_model(small, PAPER).parameters() if not p.requires_grad)
    assert sharded.parts["weights"] - frozen == pytest.approx((one.parts["weights"] - frozen) / 4, rel=0.001)


@pytest.mark.slow
def test_what_is_suggested_to_fit_fits(small: KosmosConfig) -> None:
    setting = replace(PAPER, batch=replace(PAPER.batch, rows=12, n_images=300, n_targets=24_000))
    needed = estimate(small, setting).needed
    available = needed * 0.75

    first, *_ = remedies(small, setting, needed, available, rows=24)

    rows = int(first.split()[1])
    assert first == f"micro_batch_rows {rows}"
    assert 24 % rows == 0
    assert estimate(small, replace(setting, batch=setting.batch.with_rows(rows))).needed <= available


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_refused_with_what_would_fit(small: KosmosConfig) -> None:
    setting = replace(PAPER, batch=replace(PAPER.batch, rows=64, n_images=1600, n_targets=128_000))
    estimated = estimate(small, setting)

    with pytest.raises(UserError, match=r"needs .* GB of a device that has .* GB .*; what would fit: micro_batch_rows \d"):
        check_memory(small, setting, estimated.total - 1.0, rows=64)
    with pytest.warns(UserWarning, match="may run out of memory"):
        check_memory(small, setting, estimated.needed - 1.0, rows=64)
    check_memory(small, setting, estimated.needed, rows=64)


def test_a_cpu_must_hold_weights_gradients_and_optimizer_state(small: KosmosConfig) -> None:
    setting = replace(PAPER, device="cpu", precision="32-true", batch=replace(PAPER.batch, rows=1000))
    weights = sum(4 * p.numel() for p in meta_model(small).parameters())

    check_memory(small, setting, 4 * weights, rows=1000)
    with pytest.raises(UserError, match=r"weights, gradients and optimizer state take .* GB, but this machine has"):
        check_memory(small, setting, weights, rows=1000)


def test_cached_partitions_do_not_change_an_estimate(small: KosmosConfig, gpu_estimate: Memory) -> None:
    assert estimate(small, PAPER) == gpu_estimate


def test_an_estimate_draws_no_random_numbers(small: KosmosConfig) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    estimate(small, PAPER)

    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


# ---- failures


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch whose autograd graph has changed."""

    def backward(*_: Any) -> None:
        raise AttributeError("'AddBackward0' object has no attribute '_input_metadata'\nand more lines")

    monkeypatch.setattr("kosmos_lit.costs.allocations.backward", backward)


UNKNOWN = "the memory of a step is unknown, as its estimate failed: AttributeError: 'AddBackward0' object has no attribute"


@pytest.mark.usefixtures("broken")
def test_an_estimate_that_fails_says_why(small: KosmosConfig) -> None:
    with pytest.raises(EstimateError, match=UNKNOWN) as error:
        estimate(small, PAPER)

    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["allocations", "compiled"])
def test_a_pytorch_without_the_private_parts_fails_an_estimate(
    small: KosmosConfig, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, f"kosmos_lit.costs.{module}", None)

    with pytest.raises(EstimateError, match=r"ImportError|ModuleNotFoundError"):
        estimate(small, PAPER)


@pytest.mark.usefixtures("broken")
def test_a_failed_estimate_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU no run estimates its step: this one takes its device for a GPU until training starts.
    monkeypatch.setattr("kosmos_lit.checks.memory.Setting", lambda **fields: Setting(**fields | {"device": "cuda"}))

    with pytest.warns(UserWarning, match=UNKNOWN):
        assert main(tiny_run("fit", tmp_path, tiny_world)) == 0

    assert losses(tmp_path)


@pytest.mark.usefixtures("broken")
def test_a_plan_whose_estimate_fails_says_that_memory_is_unknown(
    tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *tiny_run("plan", tmp_path, tiny_world)[1:]]) == 0

    printed = " ".join(capsys.readouterr().out.split())
    assert UNKNOWN in printed
    assert "operations" in printed


def test_an_alternative_without_an_estimate_is_not_suggested(small: KosmosConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Memory:
        raise EstimateError("unknown")

    monkeypatch.setattr("kosmos_lit.checks.memory.estimate", fails)

    assert remedies(small, replace(PAPER, batch=PAPER.batch.with_rows(4)), needed=2.0, available=1.0, rows=4) == []


def test_private_parts_of_torch_are_used_in_one_file() -> None:
    private = re.compile(r"torch\.(?:\w+\.)*_[a-z]|from (?:functorch|unittest)|\.(?:_cdata|_input_metadata|_sequence_nr)\b")
    files = Path(memory.__file__).parent.glob("*.py")

    assert {file.name for file in files if private.search(file.read_text(encoding="utf-8"))} == {"allocations.py"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_gpu_allocates_what_was_estimated(precision: str, rows: int, compiled: bool) -> None:
    config = KosmosConfig(
        vision=VisionConfig(architecture="ViT-B-16-quickgelu", pretrained=None),
        connector=ConnectorConfig(n_heads=16),
        decoder=DecoderConfig(dim=1024, n_layers=12, n_heads=16, ffn_dim=4096, compile=compiled),
    )
    setting = replace(PAPER, batch=PAPER.batch.with_rows(rows), precision=precision)
    net = Kosmos.create(config).cuda().train()
    if compiled:
        net.compile_blocks()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step(net, setting)
        optimizer.step()
        optimizer.zero_grad()

    assert estimate(config, setting).total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
