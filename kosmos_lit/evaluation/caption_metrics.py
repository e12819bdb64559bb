"""CIDEr, METEOR and SPICE of captions, by pycocoevalcap (https://github.com/salaniz/pycocoevalcap).

What each needs, beside the package:

    CIDEr                     nothing but words; those of published figures are found by a tokenizer in Java (`ptb`)
    METEOR                    Java; its jar and data are in the package
    SPICE                     Java, and two jars of Stanford CoreNLP 3.6.0 that the package downloads when first used

`plain` words are found here, without Java: figures of these are not those of tables. SPICE was written for Java 8; newer
ones have to be told to let it look into their own classes (tried with Java 17: it fails without, and with it gets as far as
CoreNLP's parser). The package prints its progress, which is kept from the user here, and keeps what it works on beside its
own files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kosmos_lit.errors import UserError

Measure = Literal["cider", "meteor", "spice"]
Tokens = Literal["ptb", "plain"]
Values = npt.NDArray[np.float64]

NOT_WORDS = re.compile(r"[^\w\s'-]|(?<!\w)['-]+|['-]+(?!\w)")
"""Signs, but for apostrophes and hyphens inside words."""
OPEN = "java.lang java.math java.net java.text java.util java.util.concurrent"
"""Packages of Java that SPICE's serialisation looks into."""
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def plain_words(text: str) -> str:
    """Return a caption's words in lower case with single blanks, without punctuation."""
    return " ".join(NOT_WORDS.sub(" ", text.lower()).split())


def check_measures(title: str, measures: Sequence[Measure], tokens: Tokens) -> None:
    """Make sure that what measures need is there.

    Raises: UserError that says what is missing, what installs it, and which option does without.
    """
    missing = []
    if measures and importlib.util.find_spec("pycocoevalcap") is None:
        missing.append("the package pycocoevalcap (pip install 'kosmos-lit[eval]'; `measures: []` does without)")
    needs_java = [*(["tokens: ptb"] if tokens == "ptb" and measures else []), *(m for m in measures if m != "cider")]
    if needs_java and shutil.which("java") is None:
        missing.append(
            f"Java for {', '.join(needs_java)} (a runtime of version 8 or later on the PATH, such as Debian's "
            "default-jre-headless; `measures: [cider]` with `tokens: plain` does without, but is not the figure of tables)"
        )
    if "spice" in measures and not missing and (lacking := [name for name in CORENLP if not (_jars() / name).is_file()]):
        missing.append(
            f"{' and '.join(lacking)} for SPICE in {_jars()} (with network: python -c 'from pycocoevalcap.spice."
            "get_stanford_models import get_stanford_models as get; get()'; `measures: [cider, meteor]` does without)"
        )
    if missing:
        raise UserError(f"{title}: its measures lack {'; and '.join(missing)}")


def _jars() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "spice" / "lib"


def measure(
    prediction: Sequence[str], target: Sequence[Sequence[str]], measures: Sequence[Measure], tokens: Tokens
) -> dict[Measure, tuple[float, Values]]:
    """Return what all captions are worth by each measure, and each of them, (n,).

    CIDEr weighs words by how few of the n images have them in their references, so it depends on the whole set and is 0
    for a single image; it reaches 10 where the tables say 1,000. METEOR and SPICE lie between 0 and 1. Of CIDEr and SPICE
    the whole is the mean; METEOR adds up its counts over all images first.

    Args:
        prediction: n captions.
        target: n lists of references.
        measures: which.
        tokens: how words are found.

    Raises: UserError if Java fails.
    """
    if not prediction or not measures:
        return {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return _measured(prediction, target, measures, tokens)
    except (OSError, subprocess.CalledProcessError, ValueError, AssertionError) as error:
        raise UserError(
            f"pycocoevalcap failed at {', '.join(measures)} with tokens: {tokens} ({type(error).__name__}: {error}); SPICE "
            "takes up to 8 GB of memory and Java 8 to 17, and the package's folder must be writable"
        ) from error


def _measured(
    prediction: Sequence[str], target: Sequence[Sequence[str]], measures: Sequence[Measure], tokens: Tokens
) -> dict[Measure, tuple[float, Values]]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice

    references, captions = _words(target, tokens), _words([[caption] for caption in prediction], tokens)
    found: dict[Measure, tuple[float, Values]] = {}
    for name in measures:
        scorer = {"cider": Cider, "meteor": Meteor, "spice": Spice}[name]()
        with _java_opened() if name == "spice" else contextlib.nullcontext():
            whole, each = scorer.compute_score(references, captions)
        if name == "meteor":  # the package ends its Java, and leaves the pipes to chance
            scorer.meteor_p.stdout.close()
            scorer.meteor_p.stderr.close()
        values = [one["All"]["f"] for one in each] if name == "spice" else each
        found[name] = float(whole), np.array(values, dtype=np.float64)
    return found


def _words(texts: Sequence[Sequence[str]], tokens: Tokens) -> dict[int, list[str]]:
    """Return the words of captions by the number of their image, as the package takes them."""
    if tokens == "plain":
        return {i: [plain_words(text) for text in each] for i, each in enumerate(texts)}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # An empty line at the end would be lost, and an image without its caption with it.
    given = {i: [{"caption": " ".join(text.split()) or "."} for text in each] for i, each in enumerate(texts)}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(given)
    return found


@contextlib.contextmanager
def _java_opened() -> Iterator[None]:
    """Let Java 9 and later, which read this variable, do what Java 8 did."""
    before = os.environ.get("JDK_JAVA_OPTIONS")
    opens = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPEN.split()]
    os.environ["JDK_JAVA_OPTIONS"] = " ".join([*([before] if before else []), *opens])
    try:
        yield
    finally:
        if before is None:
            del os.environ["JDK_JAVA_OPTIONS"]
        else:
            os.environ["JDK_JAVA_OPTIONS"] = before
