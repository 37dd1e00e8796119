"""Whether a caption affirms, denies or doubts what it names, by cue words within a clause.

The way of NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009), with cues for figure captions in
`vocabulary/certainty.json`: "no pneumothorax" is denied, "possible pneumothorax" doubted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.resources import files
from typing import Any

from medclip_hf.data.concepts.words import Words

_CLAUSE_END = re.compile(r"[.!?;](?:\s|$)|[;:]|\n\s*\n|[()\[\]]")
_AUXILIARIES = frozenset(("is", "are", "was", "were", "be", "been", "has", "have", "had", "could", "can", "also"))
_SIDES = (
    "negated_after_cue",
    "negated_before_cue",
    "uncertain_after_cue",
    "uncertain_before_cue",
    "none",
    "through",
    "ends",
)
_SILENT = ("none", "through", "ends")  # kinds that say nothing of a mention


class Certainty(Enum):
    """What a caption says of a mention."""

    AFFIRMED = "affirmed"
    UNCERTAIN = "uncertain"
    NEGATED = "negated"


@dataclass(frozen=True)
class _Cue:
    kind: str
    first: int  # word
    last: int


class CertaintyRules:
    """Judges mentions by cue words.

    Args:
        cues: lists of cues by kind, as in `vocabulary/certainty.json`.

    Raises:
        ValueError: where a kind of cue is missing or unknown.
    """

    def __init__(self, cues: Mapping[str, Any]) -> None:
        if set(cues) - {"about"} != {*_SIDES, "reach"}:
            raise ValueError(f"cues must have the keys {['reach', *_SIDES]}, got {sorted(cues)}")
        self._reach = int(cues["reach"])
        self._by_first_word: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for kind in _SIDES:
            for cue in cues[kind]:
                words = tuple(cue.lower().split())
                self._by_first_word.setdefault(words[0], []).append((words, kind))
        for entries in self._by_first_word.values():
            entries.sort(key=lambda entry: -len(entry[0]))

    def judge(self, caption: str, words: Words, mentions: Sequence[tuple[int, int]]) -> list[Certainty]:
        """The certainty of each mention.

        Args:
            caption: the text.
            words: its words.
            mentions: [first word, last word] of each, not overlapping.
        """
        lowered = [word.lower() for word in words.texts]
        occupied = {number for first, last in mentions for number in range(first, last + 1)}
        cues = self._find_cues(lowered, occupied)
        if not any(cue.kind not in _SILENT for cue in cues):
            return [Certainty.AFFIRMED] * len(mentions)
        clause_of, commas = _clauses(caption, words)
        stops = {number for cue in cues if cue.kind != "through" for number in range(cue.first, cue.last + 1)}
        certainty = dict.fromkeys(range(len(words)), Certainty.AFFIRMED)
        for cue in cues:
            if cue.kind not in _SILENT:
                kind = Certainty.NEGATED if cue.kind.startswith("negated") else Certainty.UNCERTAIN
                for number in self._scope(cue, stops, lowered, clause_of, commas):
                    if certainty[number] is not Certainty.NEGATED:
                        certainty[number] = kind
        return [certainty[last] for _, last in mentions]

    def _find_cues(self, words: list[str], occupied: set[int]) -> list[_Cue]:
        """Cues in the order of the text, the longest where several begin together; those inside mentions are none."""
        cues = []
        place = 0
        while place < len(words):
            for cue, kind in self._by_first_word.get(words[place], ()):
                if tuple(words[place : place + len(cue)]) == cue and place not in occupied:
                    cues.append(_Cue(kind, place, place + len(cue) - 1))
                    place += len(cue) - 1
                    break
            place += 1
        return cues

    def _scope(
        self, cue: _Cue, stops: set[int], words: list[str], clause_of: list[int], commas: list[bool]
    ) -> list[int]:
        """The words that a cue speaks of."""
        is_forward = cue.kind.endswith("after_cue")
        step, start = (1, cue.last + 1) if is_forward else (-1, cue.first - 1)
        while not is_forward and start > 0 and words[start] in _AUXILIARIES:  # "the nodule has been excluded"
            start -= 1
        limit = start + step * self._reach
        scope: list[int] = []
        for number in range(start, limit, step):
            if not 0 <= number < len(words) or clause_of[number] != clause_of[cue.first] or number in stops:
                break
            # A comma ends the reach, unless it stands in a list that an "or" or "and" closes.
            is_past_comma = commas[number - 1] if is_forward and number > start else not is_forward and commas[number]
            if is_past_comma and not (is_forward and self._is_list(words, number, limit, clause_of, stops)):
                break
            scope.append(number)
        return scope

    def _is_list(self, words: list[str], number: int, limit: int, clause_of: list[int], stops: set[int]) -> bool:
        for later in range(number, min(limit, len(words))):
            if clause_of[later] != clause_of[number] or later in stops:
                return later in stops and words[later] == "nor"
            if words[later] in ("or", "nor") or (words[later] == "and" and later - number <= 3):
                return True
        return False


@lru_cache(maxsize=1)
def shipped_rules() -> CertaintyRules:
    """The rules with the cues of the package."""
    path = files("medclip_hf.data.concepts").joinpath("vocabulary", "certainty.json")
    return CertaintyRules(json.loads(path.read_text(encoding="utf-8")))


def _clauses(caption: str, words: Words) -> tuple[list[int], list[bool]]:
    """(number of the clause of each word, whether a comma follows each word)."""
    clause_of, commas, clause = [], [], 0
    for number, (_, end) in enumerate(words.spans):
        clause_of.append(clause)
        gap = caption[end : words.spans[number + 1][0]] if number + 1 < len(words) else ""
        commas.append("," in gap)
        clause += _CLAUSE_END.search(gap) is not None
    return clause_of, commas
