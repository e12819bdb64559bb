"""What a run does on a GPU, on a device that does not exist: where tensors lie, and what the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kosmos_lit.batch import KosmosBatch
from kosmos_lit.callbacks import Checkpoints, GarbageCollection, LossSpikes, Progress, StepLog, Throughput, Watchdog
from kosmos_lit.callbacks.signals import EndAtSignals
from kosmos_lit.checks.device import check_backend
from kosmos_lit.cli.plan import describe_run
from kosmos_lit.config import KosmosConfig, LoraConfig, LossWeights, OptimizerConfig
from kosmos_lit.costs.memory import MicroBatch, Setting, dummy_batch
from kosmos_lit.errors import UserError
from kosmos_lit.interruption import Interruption
from kosmos_lit.lit import KosmosLit
from kosmos_lit.model import Kosmos
from kosmos_lit.sharding.fsdp import Fsdp2Strategy
from kosmos_lit.tokenizer import Tokenizer
from kosmos_lit.trainer_internals import leave_signals_alone
from kosmos_lit.weights.folder import save_folder
from tests.cli_runs import ROOT
from tests.fake_cuda import DEVICE, FakeData, FakeGpu, fake_cuda
from tests.host_waits import HostWaits
from tests.kosmos_lit.tiny_kosmos import batch_of, image_doc, text_doc, tiny_config

N_RANKS = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # On a fake device results of autograd functions are views, the loss too (`_apply_with_views`); in a run it is none.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]


@pytest.fixture
def config(kosmos_tower: str) -> KosmosConfig:
    """A tiny model with the kernel that a fake device has."""
    return tiny_config(kosmos_tower, attention_kernel="sdpa", compile=False, dropout_rate=0.1)


@pytest.fixture
def ranks() -> Iterator[None]:
    """Be rank 0 of eight, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=N_RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


# ---- initial weights


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["plain", "lora"])
def test_a_model_is_built_on_the_cpu_while_lightning_makes_the_gpu_the_default(
    config: KosmosConfig, strategy: type[Strategy], lora: LoraConfig | None
) -> None:
    lit = KosmosLit(replace(config, lora=lora))
    on_gpu = strategy(DEVICE) if strategy is SingleDeviceStrategy else strategy(parallel_devices=[DEVICE])
    with fake_cuda(), on_gpu.tensor_init_context():
        assert torch.empty(0).device.type == "cuda"
        lit.configure_model()
    assert {t.device.type for t in (*lit.net.parameters(), *lit.net.buffers())} == {"cpu"}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["plain", "lora"])
def test_initial_weights_do_not_depend_on_the_default_device(config: KosmosConfig, lora: LoraConfig | None) -> None:
    config = replace(config, lora=lora)
    expected, state = Kosmos.create(config, 3), torch.get_rng_state()
    with torch.device("meta"):  # has another generator, as a GPU has
        actual = Kosmos.create(config, 3)
    for (name, a), b in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("more_rows", [0, 5])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["plain", "lora"])
def test_a_pretrained_model_is_the_same_whatever_the_default_device(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path, more_rows: int, lora: LoraConfig | None
) -> None:
    save_folder(Kosmos.create(config, 5), kosmos_tokenizer, tmp_path / "model")
    decoder = replace(config.decoder, vocab_size=config.decoder.vocab_size + more_rows)
    nets = []
    for device in ("cpu", "meta"):
        lit = KosmosLit(replace(config, decoder=decoder, lora=lora), seed=3, init_from=str(tmp_path / "model"))
        with torch.device(device):
            lit.configure_model()
        nets.append(lit.net)
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b), name


# ---- whole runs


def batches() -> list[KosmosBatch]:
    """Micro-batches of two rows with other documents each, and 3, 0, 2 and 4 images."""
    rows = [
        [text_doc(9), image_doc(3, n_images=3)],
        [text_doc(40)],
        [text_doc(5), image_doc(2), image_doc(4)],
        [image_doc(4, n_images=4)],
    ]
    return [batch_of([row, [text_doc(12 + n), text_doc(3)]], 47, corpus=[2, 0]) for n, row in enumerate(rows)]


class Watch(Callback):
    """Counts what the host waits for from the end of the first step to the end of the last but one."""

    def __init__(self, last: int) -> None:
        self.last, self.waits = last, HostWaits("cuda")
        self.devices: set[str] = set()
        self.kinds: dict[str, type] = {}
        """Kinds of the parameters' tensors, by name."""
        self._is_active = False

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step >= 1 and not self._is_active:
            self._is_active = True
            self.devices |= {p.device.type for p in module.parameters()}
            self.n_parameters = sum(p.numel() for p in module.parameters())
            self.kinds |= {name: type(p.data) for name, p in module.named_parameters()}
            torch.cuda.synchronize.reset_mock()  # type: ignore[attr-defined]
            self.waits.__enter__()
        elif trainer.global_step == self.last:
            self.waits.__exit__(None, None, None)
            torch.cuda.synchronize.assert_not_called()  # type: ignore[attr-defined]
            trainer.should_stop = True


def fit(
    lit: KosmosLit,
    data: FakeData,
    folder: Path,
    *,
    steps: int = 3,
    micro_batches: int = 2,
    strategy: Any = "auto",
    num_nodes: int = 1,
    gpu: FakeGpu = FakeGpu(),
) -> Watch:
    """Run some steps on a fake GPU, with the callbacks of every run."""
    watch = Watch(steps - 1)
    with fake_cuda(gpu):
        for metric in (lit.step_loss, lit.val_loss):
            metric._apply(torch.empty_like)  # fake, as the model will be
        of_all = [GarbageCollection(), Watchdog(), LossSpikes(), EndAtSignals(Interruption())]
        callbacks = [StepLog(), Throughput(), Progress(), Checkpoints(str(folder)), *of_all, watch]
        trainer = L.Trainer(
            accelerator="cuda",
            devices=1,
            num_nodes=num_nodes,
            strategy=strategy,
            precision="bf16-mixed",
            max_steps=100,
            log_every_n_steps=1000,
            accumulate_grad_batches=micro_batches,
            gradient_clip_val=2.0,
            callbacks=callbacks,
            logger=False,
            enable_model_summary=False,
            limit_val_batches=0,
            val_check_interval=None,
            default_root_dir=str(folder),
        )
        leave_signals_alone(trainer)
        trainer.fit(lit, datamodule=data)
    assert trainer.global_step == steps - 1
    return watch


EQUAL, WEIGHTED = LossWeights(), LossWeights(caption=0.5)


@pytest.mark.parametrize(
    ("decoder", "weights"),
    [({}, EQUAL), ({"document_attention": "row"}, WEIGHTED), ({"recompute": "full", "loss_chunk": 11}, EQUAL)],
    ids=["own", "row, weighted", "recomputed, in chunks"],
)
def test_the_host_waits_for_no_step_of_a_run(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path, decoder: dict[str, Any], weights: LossWeights
) -> None:
    lit = KosmosLit(replace(config, decoder=replace(config.decoder, **decoder)), OptimizerConfig(total_steps=100), weights)
    watch = fit(lit, FakeData(batches(), kosmos_tokenizer, 2), tmp_path)
    assert watch.devices == {"cuda"}
    assert watch.waits.n_operations > 1000
    assert watch.waits.calls == []


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("build", [DDPStrategy, Fsdp2Strategy])
def test_the_host_waits_for_no_step_on_a_rank_of_eight(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path, build: type[Strategy]
) -> None:
    lit = KosmosLit(config, OptimizerConfig(total_steps=100))
    watch = fit(lit, FakeData(batches(), kosmos_tokenizer, 2 * N_RANKS), tmp_path, strategy=build(), num_nodes=N_RANKS)
    assert watch.devices == {"cuda"}
    assert watch.waits.n_operations > 500
    assert watch.waits.calls == []
    # FSDP2: the blocks, whose weights a rank holds an eighth of; replicated is the tower, as far as it does not train.
    shards = {name for name, kind in watch.kinds.items() if kind is DTensor}
    frozen = {f"net.{name}" for name, parameter in lit.net.named_parameters() if not parameter.requires_grad}
    assert shards == (watch.kinds.keys() - frozen if build is Fsdp2Strategy else set())


@pytest.mark.parametrize("more_rows", [0, 5])
def test_a_pretrained_model_trains_on_a_gpu(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path, more_rows: int
) -> None:
    save_folder(Kosmos.create(config, 5), kosmos_tokenizer, tmp_path / "model")
    decoder = replace(config.decoder, vocab_size=config.decoder.vocab_size + more_rows)
    lit = KosmosLit(
        replace(config, decoder=decoder),
        OptimizerConfig(total_steps=100),
        init_from=str(tmp_path / "model"),
        freeze=["decoder.layers.0"],
    )
    with torch.device("cpu"):
        lit.configure_model()  # tensors of a file have elements, which fake ones cannot be made of
    watch = fit(lit, FakeData(batches(), kosmos_tokenizer, 2), tmp_path)
    assert watch.devices == {"cuda"}
    assert watch.waits.calls == []


@pytest.mark.slow
@pytest.mark.parametrize("build", [SingleDeviceStrategy, Fsdp2Strategy])
@pytest.mark.usefixtures("ranks")
def test_the_papers_model_takes_steps_on_a_gpu(kosmos_tokenizer: Tokenizer, tmp_path: Path, build: type[Strategy]) -> None:
    run = describe_run(["-c", str(ROOT / "configs" / "kosmos1.yaml")])
    assert run.kosmos is not None
    assert run.data is not None
    rows, T = run.data.micro_batch_rows, run.data.seq_len
    vision = replace(run.kosmos.vision, pretrained=None)
    decoder = replace(run.kosmos.decoder, attention_kernel="sdpa", compile=False)
    lit = KosmosLit(replace(run.kosmos, vision=vision, decoder=decoder), run.optimizer)
    sizes = MicroBatch(rows=rows, seq_len=T, n_images=49, n_targets=rows * T - 49 * 66)
    batch = dummy_batch(Setting(batch=sizes, device="cpu"), vision.image_size)
    batch.lengths = (700, 1348) * rows
    is_sharded = build is Fsdp2Strategy
    watch = fit(
        lit,
        FakeData([batch], kosmos_tokenizer, N_RANKS if is_sharded else 1),
        tmp_path,
        micro_batches=1,
        strategy=build() if is_sharded else "auto",
        num_nodes=N_RANKS if is_sharded else 1,
    )
    assert watch.n_parameters > 1.6e9
    assert watch.devices == {"cuda"}
    assert watch.waits.calls == []


# ---- what a GPU lacks


def test_a_gpu_without_bfloat16_is_named_before_the_first_step(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data, lit = FakeData(batches(), kosmos_tokenizer, 2), KosmosLit(config, OptimizerConfig(total_steps=100))
    with pytest.raises(UserError, match="precision is bf16-mixed, but Tesla V100 has no bfloat16; use 32-true"):
        fit(lit, data, tmp_path, gpu=FakeGpu(name="Tesla V100", has_bf16=False))
    assert not hasattr(lit, "net") or all(p.grad is None for p in lit.parameters())


def test_a_batch_that_does_not_fit_is_refused_with_what_would_fit(
    config: KosmosConfig, kosmos_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    wide = replace(config.decoder, dim=1280, ffn_dim=5120, max_seq_len=1024)
    batch = batch_of([[text_doc(1000)]] * 16, 1024)
    lit = KosmosLit(replace(config, decoder=wide), OptimizerConfig(total_steps=100))
    message = r"needs \d.\d GB of a device that has 4.0 GB \(micro-batches of 16 rows .*would fit: micro_batch_rows [1248]"
    with pytest.raises(UserError, match=message):
        fit(lit, FakeData([batch], kosmos_tokenizer, 2), tmp_path, gpu=FakeGpu(memory=4e9))


@pytest.mark.parametrize("strategy", [DDPStrategy, Fsdp2Strategy])
def test_several_gpus_without_nccl_are_refused_before_they_start(
    strategy: type[Strategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with fake_cuda():
        several = L.Trainer(accelerator="cuda", devices=1, num_nodes=3, strategy=strategy(), logger=False)
        with pytest.raises(UserError, match="3 GPUs need NCCL, which this build of PyTorch lacks"):
            check_backend(several)
        check_backend(L.Trainer(accelerator="cuda", devices=1, logger=False))
