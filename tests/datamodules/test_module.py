from dataclasses import replace
from types import SimpleNamespace

import pytest

from datamodules import MixtureData
from datamodules.config import CorpusConfig, RatioConfig, TokenizerConfig
from datamodules.sources import ReadOptions
from kosmos_lit.errors import UserError
from kosmos_lit.images import ImageError
from kosmos_lit.tokenizer import IGNORE
from tests.datamodules import sample_data

OPTIONS = {
    "seq_len": 101,
    "n_latents": 3,
    "image_size": 7,
    "global_batch_rows": 12,
    "micro_batch_rows": 3,
    "num_workers": 0,
    "val_rows": 2,
    "seed": 5,
}


@pytest.fixture(scope="module")
def corpus_configs(raw, corpora):
    return {
        name: CorpusConfig(format=format_, input=[str(raw / p)], index=str(corpora[name].folder), val_share=0.3)
        for name, (format_, p) in sample_data.INPUTS.items()
    }


@pytest.fixture(scope="module")
def build(corpus_configs, tokenizer_folder):
    """Open the three corpora as a module on one rank of `world_size`."""

    def run(world_size=1, accumulate=1, val_check_interval=None, step=0, rank=0, **changes):
        tokenizer = TokenizerConfig(path=str(tokenizer_folder))
        data = MixtureData(tokenizer, **(corpus_configs | OPTIONS | changes))
        data.trainer = SimpleNamespace(
            world_size=world_size,
            global_rank=rank,
            accumulate_grad_batches=accumulate,
            global_step=step,
            val_check_interval=val_check_interval,
            max_steps=37,
            state=SimpleNamespace(fn="fit"),
            default_root_dir=str(tokenizer_folder.parent / "run"),
            ckpt_path=None,
        )
        data.prepare_data()
        return data

    return run


def ready(build, **changes):
    data = build(**changes)
    data.setup("fit")
    return data


def first_rows(data, n):
    rows = []
    for batch in data.train_dataloader():
        rows += zip(batch.rows, batch.tokens.tolist(), strict=True)
        if len(rows) >= n:
            return rows[:n]


def test_accumulation_follows_from_the_global_batch(build):
    assert ready(build).trainer.accumulate_grad_batches == 4
    assert ready(build, world_size=2).trainer.accumulate_grad_batches == 2


def test_a_global_batch_that_ranks_cannot_divide_is_refused_with_advice(build):
    with pytest.raises(UserError, match=r"12 is not divisible by 3 ranks x 3 .*; micro_batch_rows could be 1, 2, 4"):
        ready(build, world_size=3)


def test_another_accumulation_is_refused_with_both_numbers(build):
    with pytest.raises(UserError, match=r"accumulate_grad_batches is 5.* make 4"):
        ready(build, accumulate=5)


def test_validation_is_counted_in_optimizer_steps(build):
    assert ready(build, val_check_interval=7).trainer.val_check_interval == 28


def test_setting_up_twice_changes_nothing(build):
    data = ready(build, val_check_interval=7)
    data.setup("fit")
    assert data.trainer.accumulate_grad_batches == 4
    assert data.trainer.val_check_interval == 28


def test_a_resumed_module_goes_on_with_the_next_row(build):
    straight = first_rows(ready(build), 36)
    state = ready(build, step=2).state_dict()
    resumed = build(step=2)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    assert first_rows(resumed, 12) == straight[24:36]


def test_a_module_that_was_resumed_twice_counts_on(build):
    once = ready(build, step=2)
    once.load_state_dict(ready(build, step=2).state_dict())
    once.trainer.global_step = 5
    assert once.state_dict()["next_row"] == 5 * 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed was 5, is 7"),
        ({"seq_len": 97}, "seq_len was 101, is 97"),
        ({"n_latents": 2}, "n_latents was 3, is 2"),
        ({"ratio": RatioConfig(text=3)}, r"shares of rows were from row 0: text 41.7%, .* they are from row 0: text 30.0%"),
    ],
)
def test_a_checkpoint_of_another_stream_is_refused_with_both_values(build, changes, named):
    state = ready(build).state_dict()
    with pytest.raises(UserError, match=named):
        ready(build, **changes).load_state_dict(state)


def test_a_checkpoint_knows_no_ranks_and_no_micro_batches(build):
    state = ready(build, step=2).state_dict()
    other = ready(build, step=2, world_size=2, micro_batch_rows=2, rank=1)
    other.load_state_dict(state)
    assert next(iter(other.train_dataloader())).rows == (26, 27)


def test_other_files_held_out_are_other_documents_though_as_many(build, raw, corpus_configs):
    def holding_out(name):
        return {"text": replace(corpus_configs["text"], val_share=0.01, val_input=[str(raw / name)])}

    state = ready(build, **holding_out("text/a.jsonl")).state_dict()
    with pytest.raises(UserError, match="source text held other documents: held_out was"):
        ready(build, **holding_out("text/b.jsonl.gz")).load_state_dict(state)


def test_steps_keep_their_rows_where_a_run_went_on_with_a_larger_batch(build):
    state = ready(build, step=10).state_dict()
    resumed = ready(build, step=10, global_batch_rows=24)
    resumed.load_state_dict(state)
    assert next(iter(resumed.train_dataloader())).rows == (120, 121, 122)
    resumed.trainer.global_step = 13
    later = ready(build)
    later.restore_history(resumed.state_dict())
    assert [later.steps.rows(step) for step in (1, 10, 11, 13)] == [
        range(12),
        range(108, 120),
        range(120, 144),
        range(168, 192),
    ]


def test_a_checkpoint_of_another_kind_of_data_is_refused_before_the_first_row(build):
    data = ready(build, step=2)
    data.trainer.ckpt_path = "run/checkpoints/step=00000002.ckpt"  # and it has no state of this data: it was not loaded
    with pytest.raises(UserError, match=r"step=00000002\.ckpt is of a run with another kind of data than MixtureData"):
        data.train_dataloader()


def test_training_and_validation_share_no_document(build):
    data = ready(build)
    for source in data.prepared.values():
        train, val = set(sample_data.documents_of(source.train.plan)), set(sample_data.documents_of(source.val.plan))
        assert train
        assert val == set(source.held_out())
        assert not train & val


def test_validation_is_the_same_for_every_seed(build):
    rows = [[b.tokens.tolist() for b in ready(build, seed=seed).val_dataloader()] for seed in (3, 5)]
    assert rows[0] == rows[1]


def test_validation_takes_at_most_val_rows_of_each_corpus(build):
    data = ready(build)
    corpora = [c for batch in data.val_dataloader() for c in batch.corpus.tolist() if c >= 0]
    counts = [data.prepared[name].val.plan.n_rows for name in sample_data.INPUTS]
    assert corpora == [c for c, n_rows in enumerate(counts) for _ in range(min(2, n_rows))]


def test_testing_takes_every_held_out_row(build):
    data = ready(build)
    numbers = [n for batch in data.test_dataloader() for n in batch.rows if n >= 0]
    assert numbers == list(range(data.n_val_rows()))


def test_every_training_batch_has_something_to_learn(build):
    for _, batch in zip(range(5), ready(build).train_dataloader(), strict=False):
        assert (batch.targets != IGNORE).any(1).all()


def test_a_corpus_with_a_share_and_no_config_is_refused(tokenizer_folder):
    with pytest.raises(UserError, match=r"data\.ratio\.text is 5, but data\.text is not given"):
        MixtureData(tokenizer=TokenizerConfig(path=str(tokenizer_folder)), ratio=RatioConfig(text=5))


def test_no_corpus_at_all_is_refused(tokenizer_folder):
    with pytest.raises(UserError, match=r"got \[0\.0, 0\.0, 0\.0, 0\.0\], and no corpus given"):
        MixtureData(tokenizer=TokenizerConfig(path=str(tokenizer_folder)))


def test_a_share_without_a_value_is_the_papers_for_the_configured_corpora(tokenizer_folder, corpus_configs):
    two = {name: corpus_configs[name] for name in ("caption", "interleaved")}
    data = MixtureData(tokenizer=TokenizerConfig(path=str(tokenizer_folder)), **two)
    assert data.ratios == [(0, (0, 5, 2, 0))]
    assert list(data.sources) == ["caption", "interleaved"]


def test_a_corpus_without_a_share_is_not_opened(build):
    data = ready(build, ratio=RatioConfig(text=0, caption=3, interleaved=0))
    assert set(data.prepared) == {"caption"}


@pytest.mark.parametrize("name", ["seq_len", "global_batch_rows", "micro_batch_rows"])
def test_sizes_must_be_positive(build, name):
    with pytest.raises(UserError, match=rf"data\.{name} must be positive, got 0"):
        build(**{name: 0})


@pytest.mark.parametrize("name", ["val_share", "max_bad_share"])
def test_shares_must_lie_in_the_unit_interval(name):
    with pytest.raises(UserError, match=rf"{name} must lie in \[0, 1\), got 1\.5"):
        CorpusConfig(format="jsonl", input=["x"], index="somewhere", **{name: 1.5})


def test_an_index_of_other_options_is_refused_and_both_are_named(build, corpus_configs):
    other = replace(corpus_configs["interleaved"], read=ReadOptions(max_images=3))
    with pytest.raises(UserError, match=r"interleaved was prepared differently.*'max_images': 5.*'max_images': 3"):
        ready(build, interleaved=other)


def test_without_held_out_documents_there_is_no_validation(build, corpus_configs):
    data = ready(build, **{name: replace(c, val_share=0.0) for name, c in corpus_configs.items()})
    with pytest.raises(UserError, match="no corpus has held-out documents"):
        data.val_dataloader()


def test_prompts_whose_image_cannot_be_decoded_are_skipped(build, monkeypatch):
    def broken(data, size, fit):
        raise ImageError("image cannot be decoded")

    data = ready(build)
    monkeypatch.setattr("datamodules.prompt_batches.decode", broken)
    assert list(data.caption_prompts()) == []
    with pytest.raises(UserError, match=r"there are no prompts: .* or has an image that cannot be decoded"):
        list(data.predict_dataloader())


def test_a_module_describes_how_often_its_corpora_are_read(build):
    data = ready(build)
    table = [line.split() for line in data.describe(7).splitlines()]
    n_rows = {"text": 35, "caption": 35, "interleaved": 14}  # 7 steps of 12 rows at 5 : 5 : 2
    epochs = {name: f"{n / data.prepared[name].train.plan.n_rows:.2f}" for name, n in n_rows.items()}
    assert {line[0]: line[-1] for line in table[1:]} == epochs


def test_prompts_are_about_held_out_captions(build, tokenizer):
    data = ready(build)
    targets = [answer for batch in data.predict_dataloader() for answer in batch.targets]
    source = data.prepared["caption"]
    assert targets == [tokenizer.decode(source.corpus.document_tokens(d).tolist()) for d in source.held_out()]
