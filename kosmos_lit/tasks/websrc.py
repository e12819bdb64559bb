"""WebSRC: questions about web pages (KOSMOS-1, section 4.4, table 8).

The image of the page and the paper's prompt with its misspelt "Qusestion", greedy, exact match and F1 as the dataset's
authors compute them. The paper leaves open, and we choose: the split (dev: answers of test are not public), the prompt
without the page's text (the same without its last sentence), and the text of a page that is too long for the model (its
first 1,000 words).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lxml import html

from kosmos_lit.evaluation.answer_metrics import exact_match, f1
from kosmos_lit.evaluation.dataset_files import parsing, read_json, require_files
from kosmos_lit.evaluation.prompts import fill_template
from kosmos_lit.evaluation.requests import Generate, generated_text
from kosmos_lit.evaluation.task import Outcome, RequestGenerator, Sample, Task
from kosmos_lit.inference.config import GenerationConfig

EXAMPLE = (
    "Given the context below from web page, extract the answer from the given text like this: "
    "Qusestion: Who is the publisher of this book? Answer: Penguin Books Ltd."
)
UNSEEN = "//script | //style | //noscript | //template | //head | //comment()"
"""Elements of a page that are not part of its text."""


class WebSrc(Task):
    """WebSRC: `DOMAIN/SITE/dataset.csv`, `DOMAIN/SITE/processed_data/PAGE.png` and `.html`, and the file of splits.

    The CSV has `question,answer,element_id,answer_start,id`; an id begins with two letters of the domain and two digits of
    the site, and `id[2:9]` is PAGE. Splits: `dataset_split_release.json` or `dataset_split.json`, `{"dev": ["au01", ...],
    ...}` with letters and site; a site that no list names is of `train`.
    """

    title = "WebSRC"
    published = "websrc"
    main_metric = "f1"

    def __init__(
        self,
        path: str,
        *,
        split: str = "dev",
        with_text: bool = True,
        template: str | None = None,
        max_words: int | None = 1000,
        settings: GenerationConfig = GenerationConfig(max_new_tokens=64, stop=("\n",)),
        **common: Any,
    ) -> None:
        """Set the options; the defaults are the paper's.

        Args:
            path: Folder with the domains.
            split: Evaluated split.
            with_text: Put the page's text into the prompt.
            template: Text after the image; `{question}`, and `{text}` with the page's text. None: the paper's.
            max_words: Largest number of words of the page's text; None: all. A prompt that is too long fails its sample.
            settings: Settings of generation.
            **common: Options of every task.
        """
        self.title = "WebSRC, page text in the prompt" if with_text else "WebSRC, the image alone"
        self.published = "websrc" if with_text else "websrc_without_text"
        super().__init__(path, **common)
        context = " Context: {text}" if with_text else ""
        self.template = template if template is not None else EXAMPLE + context + " Q: {question} A:"
        self.split, self.with_text, self.max_words, self.settings = split, with_text, max_words, settings

    def samples(self) -> Sequence[Sample]:
        """Return the questions of the split, in the order of domains, sites and the files' lines."""
        names = [["dataset_split_release.json", "dataset_split.json"], "*/*/dataset.csv"]
        splits, _ = require_files(self.title, self.path, names, "https://x-lance.github.io/WebSRC/")
        with parsing(splits):
            split_of = {site: name for name, sites in read_json(splits).items() for site in sites}
        samples = []
        for file in sorted(self.path.glob("*/*/dataset.csv")):
            # "au01": two letters of the domain, two digits of the site.
            if split_of.get(file.parent.parent.name[:2] + file.parent.name, "train") == self.split:
                # utf-8-sig drops a byte order mark; csv asks for newline="".
                with parsing(file), file.open(encoding="utf-8-sig", newline="") as lines:
                    samples += [self._sample(file.parent, row) for row in csv.DictReader(lines)]
        return samples

    def _sample(self, folder: Path, row: dict[str, str]) -> Sample:
        page = folder / "processed_data" / row["id"][2:9]
        data = {"question": row["question"], "answer": row["answer"], "page": str(page.with_suffix(".html"))}
        return Sample(key=row["id"], images=(page.with_suffix(".png"),), data=data)

    def ask(self, sample: Sample, shots: Sequence[Sample]) -> RequestGenerator:
        """Ask the question about the page."""
        text = {"text": page_text(Path(sample.data["page"]), self.max_words)} if self.with_text else {}
        prompt = fill_template(self.template, question=sample.data["question"], **text)
        responses = yield [Generate((*sample.images, prompt), self.settings)]
        prediction, target = generated_text(responses[0]), [sample.data["answer"]]
        return Outcome(
            prediction=prediction,
            target=target,
            scores={"exact_match": exact_match(prediction, target), "f1": f1(prediction, target)},
        )


@lru_cache(maxsize=512)  # a page has dozens of questions, one after another
def page_text(path: Path, max_words: int | None) -> str:
    """Return the words of a page in the order of its HTML, separated by blanks, without scripts and styles."""
    with parsing(path):
        # lxml refuses an empty document; crawled pages may have broken bytes.
        page = html.fromstring(path.read_bytes().decode("utf-8", "replace") or "<html></html>")
    for element in page.xpath(UNSEEN):
        element.drop_tree()  # keeps the text behind the element, its tail in lxml
    # Joined by blanks: the texts of neighbouring cells are separate words.
    return " ".join(" ".join(page.itertext()).split()[:max_words])
