"""How alike texts are: BLEU, ROUGE-L, METEOR and CIDEr of generated reports, each with an interval by patient.

The packages do the counting: sacrebleu, rouge-score and pycocoevalcap. All of them get the same tokens (`tokens_of`),
so that one figure can be held against another; figures of papers depend on their own tokens and cleaning.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclip_hf.evaluation.intervals import (
    Interval,
    bootstrap_weights,
    group_sums,
    mean_with_interval,
    percentile_interval,
)

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|\.")
_MAX_ORDER = 4


@dataclass(frozen=True)
class TextFigures:
    """Likeness of generated and written texts.

    Args:
        figures: metric to its value with interval; BLEU of the corpus, the others means over texts. All in [0, 1] but
            CIDEr, in [0, 10].
        left_out: metric to the reason why it was not computed.
        num_texts: compared.
        num_empty: generated texts without a word; they count as 0.
    """

    figures: dict[str, Interval]
    left_out: dict[str, str]
    num_texts: int
    num_empty: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return vars(self) | {"figures": {name: interval.as_dict() for name, interval in self.figures.items()}}


def tokens_of(text: str) -> str:
    """Lower-cased words, numbers and full stops with single spaces between them; other punctuation is left out."""
    return " ".join(_TOKEN.findall(text.lower()))


def text_figures(
    generated: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[str] = METRICS,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> TextFigures:
    """BLEU-1 to 4, ROUGE-L (F1), METEOR 1.5 and CIDEr-D of texts with one reference each.

    CIDEr weighs words by how few of these references hold them, so its value belongs to this set; resamples keep the
    weights. METEOR runs a Java program and is left out, with the reason, where there is no Java.

    Args:
        generated: N texts; one without a word scores 0.
        references: N texts that were written.
        metrics: which of `METRICS`.
        groups: (N,) patient of each text; None: every text is its own.
        num_resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: numbers of texts that differ, no text, a reference without a word, an unknown metric.
        ImportError: a package is missing.
    """
    if len(generated) != len(references) or not len(references):
        raise ValueError(
            f"each text needs its reference and there must be one, got {len(generated)}, {len(references)}."
        )
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"unknown metrics {unknown}; known are {list(METRICS)}.")
    texts, truth = [tokens_of(text) for text in generated], [tokens_of(text) for text in references]
    if empty := [place for place, text in enumerate(truth) if not text]:
        raise ValueError(f"{len(empty)} references hold no word, the first at place {empty[0]}. Leave them out.")

    figures: dict[str, Interval] = {}
    left_out: dict[str, str] = {}
    if orders := [order for order in range(1, _MAX_ORDER + 1) if f"bleu_{order}" in metrics]:
        counts, _ = group_sums(_bleu_counts(texts, truth), groups)
        drawn = [weights @ counts for weights in bootstrap_weights(len(counts), None, num_resamples, seed)]
        corpora = np.concatenate([counts.sum(axis=0, keepdims=True), *drawn])  # the texts as they are, and resamples
        for order in orders:
            point, *resampled = _bleu(corpora, order)
            figures[f"bleu_{order}"] = percentile_interval(float(point), resampled, 0.95)
    if "meteor" in metrics and shutil.which("java") is None:
        left_out["meteor"] = "METEOR 1.5 is a Java program, and there is no 'java' on the PATH: install a Java runtime."
    for name, scores_of in (("rouge_l", _rouge_l), ("meteor", _meteor), ("cider", _cider)):
        if name in metrics and name not in left_out:
            figures[name] = mean_with_interval(
                scores_of(texts, truth), groups=groups, num_resamples=num_resamples, seed=seed
            )
    return TextFigures(figures, left_out, len(texts), sum(not text for text in texts))


def _bleu_counts(texts: Sequence[str], truth: Sequence[str]) -> NDArray[np.float64]:
    """(N, 10): n-grams found and n-grams there, orders 1 to 4, and the lengths of text and reference, by sacrebleu."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing("sacrebleu") from error
    scorer = BLEU(tokenize="none", max_ngram_order=_MAX_ORDER, effective_order=True)
    rows = []
    for text, reference in zip(texts, truth, strict=True):
        score = scorer.sentence_score(text, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.asarray(rows, dtype=np.float64)


def _bleu(sums: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """BLEU of corpora with these counts: geometric mean of the precisions times the brevity penalty, unsmoothed."""
    found, there = sums[:, :order], sums[:, _MAX_ORDER : _MAX_ORDER + order]
    length, reference_length = sums[:, -2], sums[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(found / there).mean(axis=1))
        penalty = np.minimum(1.0, np.exp(1.0 - reference_length / length))
    return np.where((there > 0).all(axis=1) & (found > 0).all(axis=1), precision * penalty, 0.0)


def _rouge_l(texts: Sequence[str], truth: Sequence[str]) -> list[float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("rouge-score") from error

    class Spaces(Tokenizer):
        """The tokens as they come."""

        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Spaces())
    return [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in zip(texts, truth, strict=True)]


def _meteor(texts: Sequence[str], truth: Sequence[str]) -> list[float]:
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise _missing("pycocoevalcap") from error
    places = [place for place, text in enumerate(texts) if text]  # the program waits for ever for an empty text
    scores = [0.0] * len(texts)
    if places:
        program = Meteor()
        try:
            _, found = program.compute_score({p: [truth[p]] for p in places}, {p: [texts[p]] for p in places})
        finally:
            program.meteor_p.kill()
            program.meteor_p.wait()
        for place, score in zip(places, found, strict=True):
            scores[place] = float(score)
    return scores


def _cider(texts: Sequence[str], truth: Sequence[str]) -> list[float]:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise _missing("pycocoevalcap") from error
    places = range(len(texts))
    _, scores = Cider().compute_score({p: [truth[p]] for p in places}, {p: [texts[p]] for p in places})
    return [float(score) for score in scores]


def _missing(package: str) -> ImportError:
    return ImportError(f"{package} is not installed. Run: pip install 'medclip-hf[evaluation]'")
