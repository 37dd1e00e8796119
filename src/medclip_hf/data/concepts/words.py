"""Words of captions and of vocabulary names, in the normal form in which they are compared."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

MAX_WORDS = 8  # of a name that is looked for in captions; longer ones are only linked to mentions found otherwise
# Accents written as characters of their own belong to a word, and soft hyphens and such inside it.
_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f]+[^\W_]*|[\u00ad\u200c\u200d\u2060\ufeff]+[^\W_]+)*")
_BRITISH_OE = re.compile(r"(?:^|(?<=^[cf])|(?<=rrh))oe")  # oedema, foetus, diarrhoea, but not hypoechoic
_JOINS = re.compile(r"[\s\u200b]*(?:[-\u2010\u2011\u2012\u2013/'’][\s\u200b]*)?")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, without pattern: words in another order give another hash


@dataclass(frozen=True)
class Words:
    """The words of a text.

    Attributes:
        texts: as written.
        normal: in normal form.
        spans: [start, end) of each in the text.
        joins: joins[i] says that word i + 1 may belong to the same term as word i: only white space, a hyphen, a slash
            or an apostrophe lies between them.
    """

    texts: tuple[str, ...]
    normal: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    joins: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.texts)


def split_words(text: str) -> Words:
    """The words of a text; a possessive s is none."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    joins: list[bool] = []
    for found in _WORD.finditer(text):
        start, end = found.span()
        word = found.group()
        if word in "sS" and start and text[start - 1] in "'’" and spans and spans[-1][1] == start - 1:
            continue
        if spans:
            gap = text[spans[-1][1] : start]
            joins.append(gap == " " or _JOINS.fullmatch(gap.removeprefix("'s").removeprefix("’s")) is not None)
        texts.append(word)
        spans.append((start, end))
    return Words(tuple(texts), tuple(map(normal_form, texts)), tuple(spans), tuple(joins))


@lru_cache(maxsize=100_000)
def normal_form(word: str) -> str:
    """A word in small letters without accents, its plural and British spelling undone ("Tumours" → "tumor").

    Both sides of a comparison go through this, so it need not give correct English ("has" → "has", "toes" → "toe").
    """
    word = word.lower()
    if not word.isascii():
        decomposed = unicodedata.normalize("NFKD", word)
        word = "".join(filter(_is_written, decomposed)).lower()
    if len(word) > 2 and word.endswith("s") and word.isalpha():
        word = _singular(word)
    if len(word) > 5:
        word = _BRITISH_OE.sub("e", word.replace("ae", "e").replace("our", "or"))
    return word


def _is_written(character: str) -> bool:
    """Whether a character is neither an accent nor invisible."""
    return not unicodedata.combining(character) and unicodedata.category(character) != "Cf"


def _singular(word: str) -> str:
    if word.endswith(("ss", "us", "is", "as", "os")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    return word[:-1]


@lru_cache(maxsize=100_000)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(words: Sequence[str]) -> Hashes:
    """One 64-bit hash a word, the same in every process."""
    return np.fromiter(map(_word_hash, words), np.uint64, len(words))


def extend_hashes(hashes: Hashes, next_words: Hashes) -> Hashes:
    """Hashes of terms that each grow by one word.

    Args:
        hashes: (n,) of the terms so far.
        next_words: (n,) hashes of the words to append.
    """
    with np.errstate(over="ignore"):
        return hashes * _MULTIPLIER + next_words


def term_hash(words: Sequence[str]) -> int:
    """The hash of a term; 0 of none."""
    hashes = word_hashes(words)
    term = hashes[:1]
    for position in range(1, len(words)):
        term = extend_hashes(term, hashes[position : position + 1])
    return int(term[0]) if len(term) else 0


def is_acronym(name: str) -> bool:
    """Whether a name must be met in capitals: "CT" and "T2WI", so that "AIDS" is not found in "aids"."""
    letters = [character for character in name if character.isalpha()]
    return " " not in name and len(name) <= 6 and len(letters) >= 2 and sum(map(str.isupper, letters)) >= 2


def agrees_in_case(name: str, mention: str) -> bool:
    """Whether an acronym is written in the mention as in the vocabulary, but for a plural s."""
    return mention.removesuffix("s") == name.removesuffix("s")
