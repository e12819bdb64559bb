"""CIDEr, METEOR and SPICE of captions, by pycocoevalcap (https://github.com/salaniz/pycocoevalcap).

What each needs, beside the package:

    CIDEr                     words only; for published values from a tokenizer in Java (`ptb`)
    METEOR                    Java; its jar and data are in the package
    SPICE                     Java, and two jars of Stanford CoreNLP 3.6.0 that the package downloads on first use

`plain` words need no Java, but CIDEr of plain words is not the published metric. The package writes temporary files beside
its own.
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

CaptionMetric = Literal["cider", "meteor", "spice"]
Tokens = Literal["ptb", "plain"]
Values = npt.NDArray[np.float64]

NOT_WORDS = re.compile(r"[^\w\s'-]|(?<!\w)['-]+|['-]+(?!\w)")
"""Punctuation, except for apostrophes and hyphens inside words."""
JAVA_PACKAGES = "java.lang java.math java.net java.text java.util java.util.concurrent"
"""Packages of Java that SPICE's serialisation accesses by reflection."""
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def plain_words(text: str) -> str:
    """Return a caption's words in lower case with single blanks, without punctuation."""
    return " ".join(NOT_WORDS.sub(" ", text.lower()).split())


def check_caption_metrics(title: str, metrics: Sequence[CaptionMetric], tokens: Tokens) -> None:
    """Check that everything the metrics need is installed.

    Raises: UserError naming what is missing, what installs it, and the options that do without.
    """
    missing = []
    if metrics and importlib.util.find_spec("pycocoevalcap") is None:
        missing.append("the package pycocoevalcap (pip install 'kosmos-lit[eval]'; `metrics: []` does without)")
    needs_java = [*(["tokens: ptb"] if tokens == "ptb" and metrics else []), *(m for m in metrics if m != "cider")]
    if needs_java and shutil.which("java") is None:
        missing.append(
            f"Java for {', '.join(needs_java)} (a runtime of version 8 or later on the PATH, such as Debian's "
            "default-jre-headless; `metrics: [cider]` with `tokens: plain` does without, but is not the published metric)"
        )
    # The jars lie in the package's folder, so the package itself must be installed before they are looked for.
    if "spice" in metrics and not missing and (absent := [name for name in CORENLP if not (_jars() / name).is_file()]):
        missing.append(
            f"{' and '.join(absent)} for SPICE in {_jars()} (with network: python -c 'from pycocoevalcap.spice."
            "get_stanford_models import get_stanford_models as get; get()'; `metrics: [cider, meteor]` does without)"
        )
    if missing:
        raise UserError(f"{title}: its metrics lack {'; and '.join(missing)}")


def _jars() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "spice" / "lib"


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[CaptionMetric], tokens: Tokens
) -> dict[CaptionMetric, tuple[float, Values]]:
    """Return by each metric its value for all captions, and the score of each caption, (n,).

    CIDEr weighs words by how few of the n images have them in their references, so it depends on the whole set and is 0
    for a single image; it reaches 10 where the tables say 1,000. METEOR and SPICE lie between 0 and 1. The values of CIDEr
    and SPICE are means of the scores; METEOR adds up its counts over all images first.

    Args:
        predictions: n captions.
        references: n lists of captions by people.
        metrics: names.
        tokens: how captions are split into words.

    Raises: UserError if Java fails.
    """
    if not predictions or not metrics:
        return {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints its progress
            return _caption_scores(predictions, references, metrics, tokens)
    except (OSError, subprocess.CalledProcessError, ValueError, AssertionError) as error:
        # A Java process that dies shows as any of these: a broken pipe, an exit code, no number, a failed assert.
        raise UserError(
            f"pycocoevalcap failed at {', '.join(metrics)} with tokens: {tokens} ({type(error).__name__}: {error}); SPICE "
            "takes up to 8 GB of memory and Java 8 to 17, and the package's folder must be writable"
        ) from error


def _caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[CaptionMetric], tokens: Tokens
) -> dict[CaptionMetric, tuple[float, Values]]:
    # Imported late: the package is an extra that other tasks do without.
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice

    reference_words, words = _words(references, tokens), _words([[caption] for caption in predictions], tokens)
    scores: dict[CaptionMetric, tuple[float, Values]] = {}
    for name in metrics:
        scorer = {"cider": Cider, "meteor": Meteor, "spice": Spice}[name]()
        with _java_module_access() if name == "spice" else contextlib.nullcontext():
            total, each = scorer.compute_score(reference_words, words)
        if name == "meteor":  # the package ends its Java process but leaves the pipes open, a ResourceWarning
            scorer.meteor_p.stdout.close()
            scorer.meteor_p.stderr.close()
        # SPICE scores each category of tuples as well; the published value is the F-score of all of them.
        values = [one["All"]["f"] for one in each] if name == "spice" else each
        scores[name] = float(total), np.array(values, dtype=np.float64)
    return scores


def _words(texts: Sequence[Sequence[str]], tokens: Tokens) -> dict[int, list[str]]:
    """Return the words of captions by their image's index, as the package takes them."""
    if tokens == "plain":
        return {i: [plain_words(text) for text in each] for i, each in enumerate(texts)}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer drops an empty line at the end, and an image without its caption would go missing.
    captions = {i: [{"caption": " ".join(text.split()) or "."} for text in each] for i, each in enumerate(texts)}
    words: dict[int, list[str]] = PTBTokenizer().tokenize(captions)
    return words


@contextlib.contextmanager
def _java_module_access() -> Iterator[None]:
    """Allow reflection into Java's own classes: SPICE was written for Java 8, and Java 9 and later forbid it.

    Tried with Java 17: SPICE fails without this; with it, it gets as far as CoreNLP's parser.
    """
    before = os.environ.get("JDK_JAVA_OPTIONS")
    opens = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in JAVA_PACKAGES.split()]
    # The launcher of Java 9 and later reads this variable; that of Java 8 ignores it.
    os.environ["JDK_JAVA_OPTIONS"] = " ".join([*([before] if before else []), *opens])
    try:
        yield
    finally:
        if before is None:
            del os.environ["JDK_JAVA_OPTIONS"]
        else:
            os.environ["JDK_JAVA_OPTIONS"] = before
