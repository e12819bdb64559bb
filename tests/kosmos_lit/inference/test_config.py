import pytest

from kosmos_lit.errors import UserError
from kosmos_lit.inference.config import GenerationConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"n_beams": -1}, "n_beams must be positive, got -1"),
        ({"temperature": -0.5}, "temperature must not be negative, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite, got inf"),
        ({"top_k": 0, "temperature": 1.0}, "top_k must be positive or null, got 0"),
        ({"top_k": 5}, "top_k 5 needs a temperature above 0"),
        ({"top_p": 1.5, "temperature": 1.0}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 0.9}, "top_p 0.9 needs a temperature above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size must be positive or null, got 0"),
        ({"stop": "a"}, "stop must be a list of strings that are not empty, got 'a'"),
        ({"stop": ("a", "")}, r"stop must be a list of strings that are not empty, got \('a', ''\)"),
        ({"choices": (3,)}, r"choices must be a list of strings that are not empty, got \(3,\)"),
        ({"beam_stop": "never"}, "beam_stop must be one of heuristic, first, exact, got 'never'"),
        ({"temperature": 1.0, "n_beams": 3}, "temperature 1.0 and n_beams 3 exclude one another"),
        ({"choices": ("a",), "stop": ("b",)}, "stop .* and choices exclude one another"),
        ({"choices": ("a",), "no_repeat_ngram_size": 2}, "no_repeat_ngram_size 2 and choices exclude one another"),
    ],
)
def test_an_invalid_setting_is_named_with_its_value(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="GenerationConfig has no field top_q; it has max_new_tokens"):
        GenerationConfig.from_dict({"top_q": 3})
