"""Which anatomies the words of a report speak of, from the tables in `words/`."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Mention:
    """A term of the lexicon in a text: `text[start:end]` speaks of `anatomies` (of none where it is to be ignored)."""

    start: int
    end: int
    anatomies: tuple[str, ...]


def load_table(name: str) -> dict[str, Any]:
    """The JSON table of that file name in `medclip_hf/data/lexicon`."""
    table = json.loads(files("medclip_hf.data.reports").joinpath("words", name).read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


class TermIndex:
    """Finds terms as whole words in texts, the longest where several begin together.

    A dictionary of first words instead of one large pattern: some twenty times faster at a few hundred terms.

    Args:
        terms: term -> what it stands for. In a term a space stands for white space or hyphens, a final ``*`` for any
            ending, and plurals in -s and -es are understood.
    """

    def __init__(self, terms: Mapping[str, tuple[str, ...]]) -> None:
        self._phrases: dict[str, list[_Phrase]] = {}
        self._stems: dict[str, tuple[str, ...]] = {}
        for term, meaning in terms.items():
            *first, last = term.lower().replace("-", " ").split()
            if last.endswith("*") and not first:
                self._stems[last[:-1]] = meaning
                continue
            endings = (last[:-1],) if last.endswith("*") else (last, f"{last}s", f"{last}es")
            for ending in endings:
                words = (*first, ending)
                self._phrases.setdefault(words[0], []).append(_Phrase(words, last.endswith("*"), meaning))
        for phrases in self._phrases.values():
            phrases.sort(key=lambda phrase: len(phrase.words), reverse=True)
        self._shortest_stem = min(map(len, self._stems), default=0)

    def find(self, text: str) -> Iterator[Mention]:
        """Mentions in the order of the text, not overlapping."""
        words = [(found.group(), found.start(), found.end()) for found in _WORD.finditer(text.lower())]
        i = 0
        while i < len(words):
            length, meaning = self._longest_at(words, i, text)
            if length:
                yield Mention(words[i][1], words[i + length - 1][2], meaning)
            i += max(length, 1)

    def _longest_at(self, words: list[tuple[str, int, int]], i: int, text: str) -> tuple[int, tuple[str, ...]]:
        """(number of words, meaning) of the longest term that begins at word i; (0, ()) where none does."""
        word = words[i][0]
        for phrase in self._phrases.get(word, ()):
            if phrase.matches(words, i, text):
                return len(phrase.words), phrase.meaning
        for end in range(len(word), self._shortest_stem - 1, -1):
            if word[:end] in self._stems:
                return 1, self._stems[word[:end]]
        return 0, ()


@dataclass(frozen=True)
class _Phrase:
    words: tuple[str, ...]
    is_open: bool  # the last word may have any ending
    meaning: tuple[str, ...]

    def matches(self, words: list[tuple[str, int, int]], i: int, text: str) -> bool:
        found = words[i : i + len(self.words)]
        if len(found) < len(self.words) or any(a[0] != b for a, b in zip(found[:-1], self.words[:-1], strict=True)):
            return False
        last = found[-1][0]
        if not (last.startswith(self.words[-1]) if self.is_open else last == self.words[-1]):
            return False
        return all(not text[a[2] : b[1]].strip(" \t\n-–") for a, b in pairwise(found))


def anatomies_known() -> tuple[str, ...]:
    """The names of the anatomies that the lexicon has words for."""
    return tuple(load_table("anatomies.json")["anatomies"])


def canonical_anatomy(name: str) -> str:
    """The lexicon's name of an anatomy that may be written otherwise ("lungs", "portal_vein_and_splenic_vein").

    Raises:
        ValueError: when the lexicon has no words for it.
    """
    found = _names().get(_plain(name))
    if found is None:
        raise ValueError(
            f"No words are known for the anatomy {name!r}. Known are {list(anatomies_known())}; "
            "add it with its words to medclip_hf/data/reports/words/anatomies.json."
        )
    return found


def find_mentions(text: str, is_weak: bool = False) -> list[Mention]:
    """Mentions in the order of the text, not overlapping, the longest where several begin together.

    Args:
        text: of a sentence.
        is_weak: look for the weak terms instead, which count only where there is nothing better.
    """
    return list(_terms(is_weak).find(text))


def mentioned_anatomies(text: str, is_weak: bool = False) -> tuple[str, ...]:
    """Anatomies mentioned in a text, each once, in the order of their first mention."""
    return unique(name for mention in find_mentions(text, is_weak) for name in mention.anatomies)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names without repetition, in their order."""
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1)
def function_words() -> dict[str, frozenset[str]]:
    """Function words of each language that is told apart, English among them."""
    return {name: frozenset(words) for name, words in load_table("languages.json").items() if name != "about"}


@lru_cache(maxsize=2)
def _terms(is_weak: bool) -> TermIndex:
    table = load_table("anatomies.json")
    if is_weak:
        return TermIndex({term: tuple(names) for term, names in table["weak"].items()})
    terms: dict[str, tuple[str, ...]] = {
        term: (name,) for name, entry in table["anatomies"].items() for term in entry["terms"]
    }
    terms |= {term: tuple(names) for term, names in table["shared"].items()}
    return TermIndex(terms | dict.fromkeys(table["ignored"], ()))


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    entries = load_table("anatomies.json")["anatomies"]
    return {_plain(alias): name for name, entry in entries.items() for alias in (name, *entry["aliases"])}


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", name.lower().replace("&", " and ")).split())
