"""How well a corpus of reports was decomposed: what stayed unassigned, and how often each anatomy is normal."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medclip_hf.data.records import AnatomyText
from medclip_hf.data.reports.decomposition import Statement, anatomy_caption
from medclip_hf.data.stages import Drop

_WORD = re.compile(r"[^\W\d_]{3,}")
# They say nothing of where a sentence belongs.
_COMMON = frozenset(
    [
        *("the", "and", "are", "was", "were", "with", "not", "has", "have", "been", "for", "from", "that", "this"),
        *("there", "observed", "detected", "seen", "within", "which", "normal", "both", "other", "than"),
    ]
)


@dataclass
class AnatomyQuality:
    """Figures of one anatomy over a corpus.

    Args:
        num_with_text: studies whose report mentions it in either section.
        num_normal: studies in which it counts as normal.
        num_captions: distinct captions over all studies: the texts that training has to encode.
        normal_rate: share of studies in which it counts as normal.
    """

    num_with_text: int = 0
    num_normal: int = 0
    num_captions: int = 0
    normal_rate: float = 0.0


@dataclass
class CorpusQuality:
    """Figures of a corpus of reports; `unassigned_words` are those that many reports share.

    Args:
        num_reports: decomposed.
        num_set_aside: reason -> reports that were not.
        num_sentences: of both sections.
        num_unassigned: sentences of which the rules know no anatomy.
        unassigned_rate: their share.
        assigned_by: how the others found their anatomies -> sentences.
        unassigned_words: (word, number of reports with it in an unassigned sentence), the most frequent first.
        anatomies: figures of each anatomy asked for.
    """

    num_reports: int = 0
    num_set_aside: dict[str, int] = field(default_factory=dict)
    num_sentences: int = 0
    num_unassigned: int = 0
    unassigned_rate: float = 0.0
    assigned_by: dict[str, int] = field(default_factory=dict)
    unassigned_words: list[tuple[str, int]] = field(default_factory=list)
    anatomies: dict[str, AnatomyQuality] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


class QualityCounter:
    """Counts over a corpus, report by report; `result` gives the figures.

    Args:
        anatomies: asked for.
        num_words: how many of the unassigned words to tell.
        min_reports: words that fewer reports share are left out: a name or a number of one patient must not reach the
            figures.
    """

    def __init__(self, anatomies: Sequence[str], num_words: int = 30, min_reports: int = 5) -> None:
        self._anatomies = tuple(anatomies)
        self._num_words = num_words
        self._min_reports = min_reports
        self._num_reports = 0
        self._set_aside: Counter[str] = Counter()
        self._assigned_by: Counter[str] = Counter()
        self._words: Counter[str] = Counter()
        self._with_text: Counter[str] = Counter()
        self._normal: Counter[str] = Counter()
        self._captions: dict[str, set[int]] = {name: set() for name in self._anatomies}

    def add(self, statements: Sequence[Statement], texts: Sequence[AnatomyText]) -> None:
        """Count a report: the statements of both its sections, and its texts."""
        self._num_reports += 1
        self._assigned_by.update(statement.assigned_by for statement in statements)
        unassigned = (statement.sentence for statement in statements if not statement.anatomies)
        self._words.update({word for sentence in unassigned for word in _WORD.findall(sentence.lower())} - _COMMON)
        for text in texts:
            self._with_text[text.anatomy] += bool(text.findings or text.impression)
            self._normal[text.anatomy] += not text.is_abnormal
            self._captions[text.anatomy].add(hash(anatomy_caption(text)))

    def set_aside(self, drop: Drop) -> None:
        """Count a report that was not decomposed."""
        self._set_aside[drop.reason] += 1

    def result(self) -> CorpusQuality:
        """The figures so far."""
        assigned = {how: number for how, number in sorted(self._assigned_by.items()) if how}
        num_sentences, num_unassigned = self._assigned_by.total(), self._assigned_by[""]
        words = [(word, number) for word, number in self._words.items() if number >= self._min_reports]
        return CorpusQuality(
            num_reports=self._num_reports,
            num_set_aside=dict(sorted(self._set_aside.items())),
            num_sentences=num_sentences,
            num_unassigned=num_unassigned,
            unassigned_rate=num_unassigned / num_sentences if num_sentences else 0.0,
            assigned_by=assigned,
            unassigned_words=sorted(words, key=lambda pair: (-pair[1], pair[0]))[: self._num_words],
            anatomies={name: self._of_anatomy(name) for name in self._anatomies},
        )

    def _of_anatomy(self, name: str) -> AnatomyQuality:
        return AnatomyQuality(
            num_with_text=self._with_text[name],
            num_normal=self._normal[name],
            num_captions=len(self._captions[name]),
            normal_rate=self._normal[name] / self._num_reports if self._num_reports else 0.0,
        )
