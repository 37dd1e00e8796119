"""Vocabulary names that are spelled like a mention: cosine of tf-idf vectors of character trigrams, by exact search.

The measure is scispaCy's. Its index is approximate; this one finds every name above a threshold and is fast because
most names need not be compared: with trigrams ordered from rare to frequent, two unit vectors whose cosine reaches t
share a trigram among the first ones of each, namely those before what is left of the vector is shorter than t
(Chaudhuri et al. 2006, Bayardo et al. 2007). Only these first trigrams have lists of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from medclip_hf.data.concepts.string_table import load_array

LOWEST_SIMILARITY = 0.7  # the lists hold what thresholds from here on need
MIN_LENGTH_RATIO = 0.7  # of the letters of two texts of the same shape
NAMES_AT_ONCE = 50_000  # whose trigrams are counted together
MAX_PAIRS = 500_000  # compared at once; some 100 MB
_CHARACTER_BITS = 21  # a code point of Unicode

Ints = NDArray[np.int64]


@dataclass
class NameNeighbours:
    """Trigram vectors of names, and for each rare trigram the names in which it is one of the first.

    Attributes:
        grams: (num_grams,) trigrams as numbers, ascending.
        ranks: (num_grams,) of each, 0 for the rarest.
        idf: (num_grams,) by rank; the last entry stands for a trigram that no name has.
        indptr, indices, data: rows of the vectors, sparse; indices are ranks, ascending.
        lists_ptr, lists: names by rank.
        num_words, num_chars: (num_names,)
        initials: (num_names,) code of the first letter.
    """

    grams: NDArray[np.uint64]
    ranks: NDArray[np.int32]
    idf: NDArray[np.float32]
    indptr: Ints
    indices: NDArray[np.int32]
    data: NDArray[np.float32]
    lists_ptr: Ints
    lists: NDArray[np.int32]
    num_words: NDArray[np.int32]
    num_chars: NDArray[np.int32]
    initials: NDArray[np.int32]

    @classmethod
    def build(cls, names: Sequence[tuple[str, ...]]) -> NameNeighbours:
        """The neighbours of names.

        Args:
            names: words of each in normal form.
        """
        owners, gram_of, counts, grams = _count_trigrams(names)
        frequency = np.bincount(gram_of, minlength=len(grams))
        ranks = np.empty(len(grams), np.int32)
        by_rarity = np.lexsort((grams, frequency))
        ranks[by_rarity] = np.arange(len(grams))
        idf = np.log((1 + len(names)) / (1 + np.append(frequency[by_rarity], 0))) + 1  # scikit-learn's smooth idf
        indptr, indices, data = _unit_rows(len(names), owners, ranks[gram_of], counts, idf)
        is_first = _first_grams(indptr, data, LOWEST_SIMILARITY)
        rows = np.repeat(np.arange(len(names)), np.diff(indptr))[is_first]
        order = np.argsort(indices[is_first], kind="stable")
        per_rank = np.bincount(indices[is_first], minlength=len(grams))
        return cls(
            grams=grams,
            ranks=ranks,
            idf=idf.astype(np.float32),
            indptr=indptr,
            indices=indices.astype(np.int32),
            data=data.astype(np.float32),
            lists_ptr=np.concatenate([[0], np.cumsum(per_rank)]).astype(np.int64),
            lists=rows[order].astype(np.int32),
            **_shapes(names),
        )

    def nearest(
        self, mentions: Sequence[tuple[str, ...]], min_similarity: float, same_shape: bool
    ) -> list[list[tuple[int, float]]]:
        """For every mention the (name number, cosine) of the names that reach the threshold, the nearest first.

        Args:
            mentions: words of each in normal form.
            min_similarity: at least `LOWEST_SIMILARITY`.
            same_shape: compare only with names of as many words that begin with the same letter and are about as long,
                which is what variants and misspellings of a name are; some twenty times faster in a large vocabulary.
        """
        found: list[list[tuple[int, float]]] = [[] for _ in mentions]
        for start in range(0, len(mentions), 2048):
            part = mentions[start : start + 2048]
            for mention, name, cosine in self._nearest(part, min_similarity, same_shape):
                found[start + mention].append((name, cosine))
        return found

    def _nearest(
        self, mentions: Sequence[tuple[str, ...]], min_similarity: float, same_shape: bool
    ) -> list[tuple[int, int, float]]:
        indptr, ranks, data = self._vectors(mentions)
        is_first = _first_grams(indptr, data, min_similarity) & (ranks >= 0)
        rows = np.repeat(np.arange(len(mentions)), np.diff(indptr))
        shapes = _shapes(mentions) if same_shape else None
        is_known = ranks >= 0
        known_ptr = np.concatenate([[0], np.cumsum(np.bincount(rows[is_known], minlength=len(mentions)))])
        vectors = sparse.csr_matrix((data[is_known], ranks[is_known], known_ptr), (len(mentions), len(self.grams)))
        hits: list[tuple[int, int, float]] = []
        for first, last in _parts(np.diff(self.lists_ptr)[ranks[is_first]]):
            pairs = self._pairs(rows[is_first][first:last], ranks[is_first][first:last], shapes)
            mention, name = np.divmod(pairs, len(self.num_words))
            cosine = self._cosines(vectors, mention, name)
            is_near = cosine >= min_similarity - 1e-6
            hits += zip(mention[is_near].tolist(), name[is_near].tolist(), cosine[is_near].tolist(), strict=True)
        return sorted(set(hits), key=lambda hit: (hit[0], -hit[2], hit[1]))

    def _vectors(self, mentions: Sequence[tuple[str, ...]]) -> tuple[Ints, NDArray[np.int64], NDArray[np.float64]]:
        """(indptr, ranks, data) of unit vectors, ranks ascending in each row; -1 for trigrams that no name has."""
        owners, codes = trigrams(mentions)
        place = np.searchsorted(self.grams, codes)
        place[place == len(self.grams)] = 0
        is_known = self.grams[place] == codes
        ranks = np.where(is_known, self.ranks[place], -1)
        # Unknown trigrams are kept apart by their codes, so that each counts once.
        keys = np.where(is_known, codes, codes | np.uint64(1 << 63))
        order = np.lexsort((keys, ranks, owners))
        owners, ranks, keys = owners[order], ranks[order], keys[order]
        is_new = np.append(True, (owners[1:] != owners[:-1]) | (keys[1:] != keys[:-1]))[: len(owners)]
        counts = np.diff(np.append(np.flatnonzero(is_new), len(owners)))
        return _unit_rows(len(mentions), owners[is_new], ranks[is_new], counts, self.idf)

    def _pairs(self, rows: Ints, ranks: Ints, shapes: dict[str, NDArray[np.int32]] | None) -> Ints:
        """Distinct mention · num_names + name of all names in the lists of these trigrams.

        Args:
            rows: the mention of each trigram.
            ranks: the trigrams.
            shapes: of the mentions, where only names of the same shape are to be taken.
        """
        starts, counts = self.lists_ptr[ranks], self.lists_ptr[ranks + 1] - self.lists_ptr[ranks]
        total = int(counts.sum())
        offsets = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        names = self.lists[np.repeat(starts, counts) + offsets].astype(np.int64)
        mentions = np.repeat(rows, counts)
        if shapes is not None:
            for field in ("initials", "num_words"):
                fits = getattr(self, field)[names] == shapes[field][mentions]
                mentions, names = mentions[fits], names[fits]
            one, two = self.num_chars[names], shapes["num_chars"][mentions]
            fits = np.minimum(one, two) >= MIN_LENGTH_RATIO * np.maximum(one, two)
            mentions, names = mentions[fits], names[fits]
        return np.unique(mentions * len(self.num_words) + names)

    def _cosines(self, vectors: sparse.csr_matrix, mention: Ints, name: Ints) -> NDArray[np.float64]:
        counts = self.indptr[name + 1] - self.indptr[name]
        ends = np.cumsum(counts)
        offsets = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        places = np.repeat(self.indptr[name], counts) + offsets
        other = sparse.csr_matrix(
            (self.data[places], self.indices[places], np.append(0, ends)), (len(name), len(self.grams))
        )
        return np.asarray(vectors[mention].multiply(other).sum(axis=1)).ravel()

    def save(self, folder: Path) -> None:
        """Write the arrays."""
        for name in self.__dataclass_fields__:
            np.save(folder / f"neighbours_{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> NameNeighbours:
        """What `save` wrote, memory-mapped."""
        return cls(*(load_array(folder, f"neighbours_{name}") for name in cls.__dataclass_fields__))


def trigrams(texts: Sequence[tuple[str, ...]]) -> tuple[Ints, NDArray[np.uint64]]:
    """(text number, trigram) of all trigrams of the texts; each word counts with a space before and after it.

    A trigram is three code points in one number, so no two share one.
    """
    joined = "".join(f" {' '.join(words)} \n" for words in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < 3:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    shift = np.uint64(_CHARACTER_BITS)
    grams = (((codes[:-2] << shift) | codes[1:-1]) << shift) | codes[2:]
    line = np.cumsum(codes == ord("\n"))[:-2]
    middle = codes[1:-1]
    is_inside = (middle != ord(" ")) & (middle != ord("\n")) & (codes[:-2] != ord("\n")) & (codes[2:] != ord("\n"))
    return line[is_inside].astype(np.int64), grams[is_inside]


def _shapes(texts: Sequence[tuple[str, ...]]) -> dict[str, NDArray[np.int32]]:
    """Number of words, of letters, and the first letter of each text."""
    return {
        "num_words": np.array([len(words) for words in texts], np.int32),
        "num_chars": np.array([sum(map(len, words)) for words in texts], np.int32),
        "initials": np.array([ord(words[0][0]) if words else 0 for words in texts], np.int32),
    }


def _count_trigrams(names: Sequence[tuple[str, ...]]) -> tuple[Ints, Ints, Ints, NDArray[np.uint64]]:
    """(name number, place in `grams`, count) of the distinct trigrams of each name, and `grams`, ascending."""
    parts = []
    for start in range(0, len(names), NAMES_AT_ONCE):
        owners, codes = trigrams(names[start : start + NAMES_AT_ONCE])
        grams, gram_of = np.unique(codes, return_inverse=True)
        pairs, counts = np.unique(owners * max(len(grams), 1) + gram_of, return_counts=True)
        owners, gram_of = np.divmod(pairs, max(len(grams), 1))
        parts.append((owners + start, gram_of, counts, grams))
    all_grams = np.unique(np.concatenate([grams for *_, grams in parts]))
    return (
        np.concatenate([owners for owners, *_ in parts]),
        np.concatenate([np.searchsorted(all_grams, grams)[gram_of] for _, gram_of, _, grams in parts]),
        np.concatenate([counts for _, _, counts, _ in parts]),
        all_grams,
    )


def _unit_rows(
    num_rows: int, owners: Ints, ranks: NDArray, counts: NDArray, idf: NDArray
) -> tuple[Ints, NDArray[np.int64], NDArray[np.float64]]:
    """(indptr, ranks, data) of tf-idf rows of length 1, sorted by row and rank; rank -1 takes the last idf."""
    order = np.lexsort((ranks, owners))
    owners, ranks = owners[order], ranks[order].astype(np.int64)
    data = counts[order] * idf[ranks].astype(np.float64)
    norms = np.sqrt(np.bincount(owners, data * data, minlength=num_rows))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=num_rows))]).astype(np.int64)
    return indptr, ranks, data / norms[owners]


def _first_grams(indptr: Ints, data: NDArray, threshold: float) -> NDArray[np.bool_]:
    """Which entries come before the rest of their row is shorter than the threshold."""
    before = np.concatenate([[0.0], np.cumsum(np.square(data, dtype=np.float64))])
    row_ends = np.repeat(before[indptr[1:]], np.diff(indptr))
    rest = row_ends - before[:-1]  # squared length from this entry on
    return rest >= threshold**2 - 1e-6


def _parts(counts: Ints) -> list[tuple[int, int]]:
    """[first, last) of runs of lists whose sizes sum to at most `MAX_PAIRS`, one list at least."""
    group = (np.cumsum(counts) - counts) // MAX_PAIRS
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))[: len(counts)]
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(counts)], strict=True)) if len(counts) else []
