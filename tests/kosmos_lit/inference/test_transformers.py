"""Generated tokens equal those of transformers' Kosmos-2 for the same random weights.

Layers are scaled so that a model does not only repeat its last token, and logits spread over several nats: float32 sums in
another order move them by some 1e-6, and in the greedy cases no step is decided by less than 1e-4, which is asserted.

With its cache on, transformers 5 counts padding on the left into the positions of new tokens, but not into those of the
prompt, so that an answer depends on its neighbours' lengths. So padded batches are compared with its cache off, or prompt by
prompt.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kosmos_lit.config import ConnectorConfig, DecoderConfig, KosmosConfig, VisionConfig
from kosmos_lit.inference.config import GenerationConfig
from kosmos_lit.inference.engine import Engine
from kosmos_lit.inference.logits_processors import forbidden_ids
from kosmos_lit.inference.prompts import Prompt
from kosmos_lit.model import Kosmos
from kosmos_lit.tokenizer import BOS, EOS, PAD, expand_images
from kosmos_lit.weights.kosmos2 import to_transformers
from tests.kosmos_lit.tiny_kosmos import SPECIAL, VOCAB, shaken, words

# Seeds, and lengths of the row of </s>, for which some continuations end early and none says the same all the time.
SHAPES = {
    "narrow": {"dim": 20, "heads": 5, "layers": 2, "ffn": 23, "latents": 3, "side": 14, "patch": 7, "width": 12}
    | {"seed": 0, "end": 1.0},
    "wide": {"dim": 66, "heads": 3, "layers": 3, "ffn": 101, "latents": 5, "side": 33, "patch": 11, "width": 24}
    | {"seed": 0, "end": 1.4},
    "one head": {"dim": 30, "heads": 1, "layers": 4, "ffn": 61, "latents": 1, "side": 10, "patch": 5, "width": 18}
    | {"seed": 4, "end": 1.4},
}


class Pair:
    """A model and the same one in transformers."""

    def __init__(self, shape: str) -> None:
        s: dict[str, Any] = SHAPES[shape]
        tower = {"image_size": s["side"], "patch_size": s["patch"], "width": s["width"], "layers": 2, "head_width": 6}
        config = KosmosConfig(
            vision=VisionConfig(
                architecture={"embed_dim": s["width"], "vision_cfg": tower, "quick_gelu": True},
                pretrained=None,
                image_size=s["side"],
            ),
            connector=ConnectorConfig(n_latents=s["latents"], n_heads=s["heads"]),
            decoder=DecoderConfig(
                vocab_size=VOCAB,
                dim=s["dim"],
                n_layers=s["layers"],
                n_heads=s["heads"],
                ffn_dim=s["ffn"],
                max_seq_len=127,
                positions="sinusoidal",
            ),
        )
        self.model = shaken(Kosmos.create(config, s["seed"]), s["seed"], by=0.05).eval()
        with torch.no_grad():
            for layer in self.model.decoder.layers:
                layer.self_attn.out_proj.weight *= 30
                layer.ffn.fc2.weight *= 30
            self.model.decoder.embed_tokens.weight[EOS] *= s["end"]
        self.other: Any = to_transformers(self.model)
        self.n_latents, self.side = s["latents"], s["side"]

    def prompt(self, n_words: int, n_images: int = 0, seed: int = 0) -> Prompt:
        ids = [BOS]
        for i in range(n_images):
            ids += [*words(1, seed + 10 + i), SPECIAL.image]
        tokens, _, slots = expand_images(np.array(ids + words(n_words, seed)), SPECIAL, self.n_latents)
        return Prompt(tokens, slots)

    def random_images(self, n: int) -> Tensor:
        draw = torch.Generator().manual_seed(7)
        return torch.randint(256, (n, 3, self.side, self.side), generator=draw, dtype=torch.uint8)

    def generate(self, tokenizer: Any, prompts: list[Prompt], images: Tensor, **settings: Any) -> list[list[int]]:
        continuations = Engine(self.model, tokenizer).generate_batch(prompts, images, GenerationConfig(**settings))
        return [list(continuation.tokens) for continuation in continuations]

    @torch.inference_mode()
    def generate_reference(
        self, tokenizer: Any, prompts: list[Prompt], images: Tensor, margin: float = 0.0, **settings: Any
    ) -> list[list[int]]:
        """Generate with transformers, which must decide every step by `margin` at least; with one prompt, any images."""
        T = max(len(prompt.tokens) for prompt in prompts)
        tokens = torch.full((len(prompts), T), PAD)
        places = torch.zeros(len(prompts), T, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padding = T - len(prompt.tokens)
            tokens[row, padding:] = torch.from_numpy(prompt.tokens)
            for slot in prompt.slots:
                places[row, padding + int(slot) : padding + int(slot) + self.n_latents] = 1
        image_inputs = {}
        if len(images):
            latents = self.encode_images(images)
            image_inputs = {"image_embeds_position_mask": places}
            image_inputs["image_embeds"] = latents.flatten(0, 1)[None] if len(prompts) == 1 else latents
        generate = self.other.generate if len(images) else self.other.text_model.generate
        outputs = generate(
            input_ids=tokens,
            attention_mask=(tokens != PAD).long(),
            **image_inputs,
            do_sample=False,
            output_scores=True,
            suppress_tokens=forbidden_ids(tokenizer, VOCAB),
            return_dict_in_generate=True,
            **settings,
        )
        for step, scores in enumerate(outputs.scores if margin else ()):
            best = scores.topk(2).values  # (B, 2)
            running = ~(outputs.sequences[:, T : T + step] == EOS).any(1)
            assert ((best[:, 0] - best[:, 1])[running] > margin).all()
        rows = outputs.sequences[:, T:].tolist()
        return [row[: row.index(EOS)] if EOS in row else [id_ for id_ in row if id_ != PAD] for row in rows]

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents (N, L, D) that transformers' model has of the images."""
        vision = self.model.config.vision
        mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (vision.mean, vision.std))
        hidden = self.other.vision_model((images.float() - mean) / std)[0]
        features = torch.nn.functional.normalize(self.other.vision_model.model.post_layernorm(hidden), dim=-1)
        return self.other.image_to_text_projection(features)[0]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


PENALTY, NGRAM = {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}
RULES = [{}, PENALTY, NGRAM, {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3}]


@pytest.mark.parametrize(("n_images", "rules"), [(0, {}), (3, {}), *((1, rules) for rules in RULES)], ids=str)
def test_greedy_decoding_is_that_of_transformers(pair: Pair, kosmos_tokenizer: Any, n_images: int, rules: dict[str, Any]):
    actual = []
    for seed in range(5):
        prompt, images = pair.prompt(3 + seed, n_images, seed), pair.random_images(n_images)
        settings = {"max_new_tokens": 17}
        actual += pair.generate(kosmos_tokenizer, [prompt], images, **settings, **rules)
        assert actual[-1:] == pair.generate_reference(kosmos_tokenizer, [prompt], images, margin=1e-4, **settings, **rules)
    assert len({id_ for ids in actual for id_ in ids}) > 2


@pytest.mark.parametrize(("n_images", "length_penalty"), [(0, 1.0), (1, 0.0), (1, 1.0), (1, 2.0), (3, 1.0)])
@pytest.mark.parametrize("rules", [RULES[0], RULES[3]], ids=str)
def test_beam_search_is_that_of_transformers(
    pair: Pair, kosmos_tokenizer: Any, n_images: int, length_penalty: float, rules: dict[str, Any]
):
    for seed in range(3):
        prompt, images = pair.prompt(3 + seed, n_images, seed), pair.random_images(n_images)
        settings = {"max_new_tokens": 17, "length_penalty": length_penalty, **rules}
        actual = pair.generate(kosmos_tokenizer, [prompt], images, n_beams=5, **settings)
        assert actual == pair.generate_reference(kosmos_tokenizer, [prompt], images, num_beams=5, **settings)


def test_some_continuations_end_and_some_do_not(pair: Pair, kosmos_tokenizer: Any):
    lengths = set()
    for n in (0, 1):
        prompts, images = [pair.prompt(3 + seed, n, seed) for seed in range(5)], pair.random_images(5 * n)
        lengths |= {len(ids) for ids in pair.generate(kosmos_tokenizer, prompts, images, max_new_tokens=17, n_beams=5)}
    assert 17 in lengths
    assert len(lengths) > 1


@pytest.mark.parametrize(("beam_stop", "early_stopping"), [("heuristic", False), ("first", True), ("exact", "never")])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 2.0])
def test_a_search_ends_by_the_same_rules(
    pair: Pair, kosmos_tokenizer: Any, beam_stop: str, early_stopping: Any, length_penalty: float
):
    prompts = [pair.prompt(5, 0, seed) for seed in range(7)]
    settings = {"max_new_tokens": 13, "length_penalty": length_penalty}
    actual = pair.generate(kosmos_tokenizer, prompts, pair.random_images(0), n_beams=3, beam_stop=beam_stop, **settings)
    assert actual == pair.generate_reference(
        kosmos_tokenizer, prompts, pair.random_images(0), num_beams=3, early_stopping=early_stopping, **settings
    )


@pytest.mark.parametrize("n_beams", [1, 5])
def test_prompts_of_one_length_generate_as_a_batch_of_transformers(pair: Pair, kosmos_tokenizer: Any, n_beams: int):
    prompts, images = [pair.prompt(5, 1, seed) for seed in range(4)], pair.random_images(4)
    actual = pair.generate(kosmos_tokenizer, prompts, images, n_beams=n_beams, max_new_tokens=17)
    assert actual == pair.generate_reference(kosmos_tokenizer, prompts, images, num_beams=n_beams, max_new_tokens=17)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_padded_prompts_generate_as_in_transformers_without_its_cache(
    pair: Pair, kosmos_tokenizer: Any, rules: dict[str, Any]
):
    prompts = [pair.prompt(n, k, n) for n, k in ((2, 0), (11, 2), (5, 1), (0, 1))]
    images, settings = pair.random_images(4), {"max_new_tokens": 11, **rules}
    actual = pair.generate(kosmos_tokenizer, prompts, images, **settings)
    assert actual == pair.generate_reference(kosmos_tokenizer, prompts, images, use_cache=False, **settings)


def test_beam_search_of_padded_prompts_is_that_of_each_alone_in_transformers(pair: Pair, kosmos_tokenizer: Any):
    n_images = (0, 2, 1, 1)
    prompts = [pair.prompt(n, k, n) for n, k in zip((2, 11, 5, 0), n_images, strict=True)]
    images = pair.random_images(4)
    actual = pair.generate(kosmos_tokenizer, prompts, images, n_beams=5, max_new_tokens=11)
    alone = [
        pair.generate_reference(kosmos_tokenizer, [prompt], own, num_beams=5, max_new_tokens=11)[0]
        for prompt, own in zip(prompts, images.split(n_images), strict=True)
    ]
    assert actual == alone
