"""The index of a vocabulary: what it refuses, what it keeps, and that its search misses nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from medclip_hf.data.concepts.index import Concept, ConceptIndex, normal_name, read_vocabulary
from medclip_hf.data.concepts.neighbours import NameNeighbours
from medclip_hf.data.concepts.words import normal_form, split_words

SYLLABLES = ("car", "din", "ost", "neph", "it", "oma", "ren", "al", "hep", "ic", "der", "ma", "to", "lys", "is")


def random_names(count: int, seed: int) -> list[tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    return [
        tuple("".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(rng.integers(1, 4)))
        for _ in range(count)
    ]


def scikit_cosines(names: list[tuple[str, ...]], mentions: list[tuple[str, ...]]) -> np.ndarray:
    """(mention, name) cosines as scispaCy's vectoriser gives them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), min_df=1)
    vectors = vectorizer.fit_transform([" ".join(name) for name in names])
    return (vectorizer.transform([" ".join(mention) for mention in mentions]) @ vectors.T).toarray()


def test_similarities_are_those_of_scispacy_and_none_above_the_threshold_is_missed() -> None:
    names = random_names(1500, seed=1)
    cosines = scikit_cosines(names, names[:300])
    found = NameNeighbours.build(names).nearest(names[:300], 0.8, same_shape=False)
    for mention, near in enumerate(found):
        assert {name for name, _ in near} >= set(np.flatnonzero(cosines[mention] >= 0.8 + 1e-5))
        assert {name for name, _ in near} <= set(np.flatnonzero(cosines[mention] >= 0.8 - 1e-5))
        np.testing.assert_allclose([cosine for _, cosine in near], cosines[mention][[n for n, _ in near]], atol=1e-5)


def test_trigrams_that_no_name_has_lower_the_similarity() -> None:
    neighbours = NameNeighbours.build([("meningioma",), ("glioma",)])
    ((_, same),) = neighbours.nearest([("meningioma",)], 0.7, True)[0]
    ((_, other),) = neighbours.nearest([("meningiomaq",)], 0.7, True)[0]
    assert same == pytest.approx(1)
    assert other < 0.95


def test_names_of_another_shape_are_left_out_where_asked() -> None:
    names = [("lung", "cancer"), ("sung", "cancer"), ("lung", "cancer", "of"), ("lung", "cancers")]
    near = NameNeighbours.build(names).nearest([("lung", "cancer")], 0.7, same_shape=True)[0]
    assert [name for name, _ in near] == [0, 3]


@pytest.mark.parametrize("mentions", [[], [()], [("zzz",)], [("a",)]])
def test_a_mention_like_no_name_has_no_neighbours(mentions: list[tuple[str, ...]]) -> None:
    assert NameNeighbours.build([("glioma",)]).nearest(mentions, 0.8, False) == [[] for _ in mentions]


def test_a_saved_index_is_mapped_and_finds_the_same(tmp_path: Path) -> None:
    index = ConceptIndex.build([Concept("C1", "Lung cancer", ("carcinoma of lung",)), Concept("C2", "Cyst")])
    index.save(tmp_path / "index")
    loaded = ConceptIndex.load(tmp_path / "index")
    assert isinstance(loaded.hashes, np.memmap)
    assert list(loaded.names) == list(index.names)
    for name in ("hashes", "goes_on", "first", "count", "by_term", "concept_of", "acronyms"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(index, name))


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no concept index"):
        ConceptIndex.load(tmp_path)


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    ConceptIndex.build([Concept("C1", "Cyst")]).save(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format"):
        ConceptIndex.load(tmp_path)


def test_of_concepts_with_one_name_the_one_that_is_called_so_is_preferred() -> None:
    index = ConceptIndex.build([Concept("A", "Tumor", ("mass",)), Concept("B", "Mass")])
    names = [name for name in range(len(index.names)) if index.names[name].lower() == "mass"]
    assert [index.ids[int(index.concept_of[name])] for name in names] == ["B", "A"]


def test_a_repeated_identifier_is_refused() -> None:
    with pytest.raises(ValueError, match="comes twice"):
        ConceptIndex.build([Concept("A", "Cyst"), Concept("A", "Nodule")])


def test_a_vocabulary_of_stop_words_is_refused() -> None:
    with pytest.raises(ValueError, match="no name"):
        ConceptIndex.build([Concept("A", "the"), Concept("B", "+"), Concept("C", "12")])


@pytest.mark.parametrize("name", ["of the", "7", "α", "?", "", "x" * 300, "who"])
def test_names_that_would_be_found_everywhere_or_nowhere_are_left_out(name: str) -> None:
    assert normal_name(name) == ()


def test_scispacy_s_format_is_read(tmp_path: Path) -> None:
    line = {"concept_id": "C0", "canonical_name": "Cyst", "aliases": ["Cysts"], "types": ["T190"], "definition": "…"}
    (tmp_path / "kb.jsonl").write_text(json.dumps(line) + "\n\n", encoding="utf-8-sig")
    assert list(read_vocabulary(tmp_path / "kb.jsonl")) == [Concept("C0", "Cyst", ("Cysts",), ("T190",))]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"concept_id": "C1"}',
        '{"concept_id": 3, "canonical_name": "x"}',
        "[" * 100_000,
        '{"concept_id": "C1", "canonical_name": "x", "aliases": "y"}',
        '{"concept_id": "C1", "canonical_name": " "}',
    ],
)
def test_a_line_that_is_no_concept_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "kb.jsonl").write_text('{"concept_id": "C0", "canonical_name": "Cyst"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"kb\.jsonl, line 2"):
        list(read_vocabulary(tmp_path / "kb.jsonl"))


def test_a_vocabulary_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "kb.jsonl").write_bytes('{"concept_id": "C0", "canonical_name": "Ödem"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"kb\.jsonl, line 1"):
        list(read_vocabulary(tmp_path / "kb.jsonl"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tumours", "tumor"),
        ("biopsies", "biopsy"),
        ("masses", "mass"),
        ("oesophagus", "esophagus"),
        ("Ischaemia", "ischemia"),
        ("diarrhoea", "diarrhea"),
        ("CTs", "ct"),
    ],
)
def test_forms_of_one_word_are_equal(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize("word", ["pus", "gas", "diagnosis", "mass", "hypoechoic"])
def test_words_that_only_look_like_plurals_stay(word: str) -> None:
    assert normal_form(word) == word


def test_words_know_where_they_stand() -> None:
    words = split_words("Crohn's T2-weighted, MRI")
    assert words.texts == ("Crohn", "T2", "weighted", "MRI")
    assert words.spans == ((0, 5), (8, 10), (11, 19), (21, 24))
    assert words.joins == (True, True, False)
