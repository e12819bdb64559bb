"""The tokenizer: control tokens, pieces of two kinds, their files, and the token form of an image."""

from kosmos_lit.tokenizer.files import has_tokenizer
from kosmos_lit.tokenizer.tokenizer import IGNORE, Tokenizer, clean, expand_images, trimmed
from kosmos_lit.tokenizer.vocabulary import (
    BOS,
    EOS,
    GROUNDING,
    GROUNDING_TAGS,
    LEADING,
    PAD,
    TRAILING,
    UNK,
    Ids,
    SpecialTokens,
    grounding,
)
from kosmos_lit.tokenizer.xlm_roberta import MODEL_FILE

__all__ = [
    "BOS",
    "EOS",
    "GROUNDING",
    "GROUNDING_TAGS",
    "IGNORE",
    "LEADING",
    "MODEL_FILE",
    "PAD",
    "TRAILING",
    "UNK",
    "Ids",
    "SpecialTokens",
    "Tokenizer",
    "clean",
    "expand_images",
    "grounding",
    "has_tokenizer",
    "trimmed",
]
