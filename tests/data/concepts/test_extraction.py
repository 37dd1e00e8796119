"""Concepts of captions: what is found, where exactly, and what a caption says of it."""

import json
import os
import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("spacy")
pytest.importorskip("scispacy")

from medclip_hf.data.concepts.extraction import MAX_CAPTION_CHARS, ConceptExtractor, ExtractorOptions
from medclip_hf.data.concepts.index import Concept, ConceptIndex
from medclip_hf.data.concepts.words import split_words

VOCABULARY = (
    Concept("C1", "Pneumothorax", ("collapsed lung",), ("T046",)),
    Concept("C2", "Computed tomography", ("CT",), ("T060",)),
    Concept("C3", "Lung", (), ("T023",)),
    Concept("C4", "Lung nodule", ("pulmonary nodule",), ("T047",)),
    Concept("C5", "Hypoechoic lesion", (), ("T033",)),
    Concept("C6", "Glioblastoma multiforme", (), ("T191",)),
    Concept("C7", "Oedema", (), ("T046",)),
    Concept("C8", "AIDS", (), ("T047",)),
)


@pytest.fixture(scope="module")
def small() -> ConceptExtractor:
    return ConceptExtractor(ConceptIndex.build(VOCABULARY))


@pytest.fixture(scope="module")
def shipped() -> ConceptExtractor:
    return ConceptExtractor.from_vocabulary("shipped")


def write_vocabulary(path: Path, concepts: tuple[Concept, ...] = VOCABULARY) -> Path:
    lines = [
        {"concept_id": c.concept_id, "canonical_name": c.name, "aliases": list(c.aliases), "types": list(c.types)}
        for c in concepts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def found(extractor: ConceptExtractor, caption: str) -> list[tuple[str, str]]:
    (mentions,) = extractor.extract([caption])
    return [(caption[mention.start_char : mention.end_char], mention.cui) for mention in mentions]


def test_a_mention_carries_identifier_name_type_and_its_place(small: ConceptExtractor) -> None:
    (mention,) = small.extract(["Axial CT."])[0]
    assert (mention.cui, mention.name, mention.semantic_type) == ("C2", "Computed tomography", "T060")
    assert (mention.start_char, mention.end_char, mention.similarity, mention.is_negated) == (6, 8, 1.0, False)


@pytest.mark.parametrize(
    ("caption", "mention"),
    [
        ("Pulmonary nodules", "Pulmonary nodules"),
        ("a pulmonary-nodule", "pulmonary-nodule"),
        ("pulmonary\n  nodule", "pulmonary\n  nodule"),
        ("the PULMONARY NODULE’s rim", "PULMONARY NODULE"),
        ("pu\u0301lmonary nodule", "pu\u0301lmonary nodule"),  # an accent as a character of its own
    ],
)
def test_case_plural_hyphens_and_accents_do_not_matter(small: ConceptExtractor, caption: str, mention: str) -> None:
    assert found(small, caption) == [(mention, "C4")]


def test_british_and_american_spelling_are_one(small: ConceptExtractor) -> None:
    assert found(small, "edema and oedema") == [("edema", "C7"), ("oedema", "C7")]


def test_the_longest_of_overlapping_names_is_taken(small: ConceptExtractor) -> None:
    assert found(small, "lung nodule and lung") == [("lung nodule", "C4"), ("lung", "C3")]


def test_a_name_does_not_reach_over_punctuation(small: ConceptExtractor) -> None:
    assert found(small, "lung. Nodule; lung, nodule") == [("lung", "C3"), ("lung", "C3")]


def test_an_acronym_is_met_in_capitals_only(small: ConceptExtractor) -> None:
    assert found(small, "AIDS, hearing aids; CTs, ct") == [("AIDS", "C8"), ("CTs", "C2")]


def test_nearly_equal_spelling_is_linked_with_its_similarity(small: ConceptExtractor) -> None:
    (mention,) = small.extract(["a glioblastoma multiform"])[0]
    assert mention.cui == "C6"
    assert 0.8 <= mention.similarity < 1


def test_opposites_of_similar_spelling_are_not_linked(small: ConceptExtractor) -> None:
    assert found(small, "hypoechoic lesion, hyperechoic lesion") == [("hypoechoic lesion", "C5")]


def test_a_threshold_of_one_takes_no_similar_spelling() -> None:
    strict = ConceptExtractor(ConceptIndex.build(VOCABULARY), ExtractorOptions(min_similarity=1.0))
    assert found(strict, "glioblastoma multiform") == []


def test_an_abbreviation_stands_for_the_long_form_that_the_caption_gives(small: ConceptExtractor) -> None:
    caption = "Pulmonary nodule (PN) on CT. The PN grew."
    assert found(small, caption) == [("Pulmonary nodule", "C4"), ("PN", "C4"), ("CT", "C2"), ("PN", "C4")]


@pytest.mark.parametrize(
    "caption",
    ["PN (pulmonary nodule) grew; the PN is large.", "A pulmonary nodule [PN] grew; the PN is large, as PNs are."],
)
def test_an_abbreviation_is_read_before_its_long_form_and_in_square_brackets(
    small: ConceptExtractor, caption: str
) -> None:
    assert {mention for mention, _ in found(small, caption)} >= {"PN", "pulmonary nodule"}
    assert {cui for _, cui in found(small, caption)} == {"C4"}


def test_the_end_of_an_explanation_is_not_what_the_abbreviation_means(small: ConceptExtractor) -> None:
    caption = "CT (computed tomography of the chest and the lung)"
    assert found(small, caption)[0] == ("CT", "C2")


def test_an_abbreviation_explained_otherwise_is_not_the_vocabulary_s(small: ConceptExtractor) -> None:
    assert found(small, "Calcitonin treatment (CT) of mice; CT worked.") == []


def test_a_mention_in_parentheses_without_capitals_explains_nothing(small: ConceptExtractor) -> None:
    assert found(small, "lung in a normal woman (arrow)") == [("lung", "C3")]


def test_denied_mentions_are_marked(small: ConceptExtractor) -> None:
    mentions = small.extract(["CT: no pneumothorax, but a lung nodule."])[0]
    assert [(mention.cui, mention.is_negated) for mention in mentions] == [("C2", False), ("C1", True), ("C4", False)]


def test_doubted_mentions_are_told_apart(small: ConceptExtractor) -> None:
    ((mention,),) = small.extract(["Possible pneumothorax."])
    assert mention.is_uncertain
    assert not mention.is_negated


def test_only_asked_semantic_types_are_kept() -> None:
    only = ConceptExtractor(ConceptIndex.build(VOCABULARY), ExtractorOptions(semantic_types=("T046", "T060")))
    assert found(only, "CT of the lung: pneumothorax") == [("CT", "C2"), ("pneumothorax", "C1")]


def test_a_filtered_concept_gives_way_to_one_of_the_same_name() -> None:
    vocabulary = (Concept("A1", "Cold", (), ("T067",)), Concept("B1", "Common cold", ("cold",), ("T047",)))
    index = ConceptIndex.build(vocabulary)
    assert found(ConceptExtractor(index), "cold") == [("cold", "A1")]
    assert found(ConceptExtractor(index, ExtractorOptions(semantic_types=("T047",))), "cold") == [("cold", "B1")]


def test_unknown_semantic_types_are_refused() -> None:
    with pytest.raises(ValueError, match="T999"):
        ConceptExtractor(ConceptIndex.build(VOCABULARY), ExtractorOptions(semantic_types=("T999",)))


def test_a_threshold_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.7 to 1"):
        ExtractorOptions(min_similarity=0.2)


def test_an_absent_pipeline_is_named() -> None:
    with pytest.raises(ValueError, match="en_core_sci_nowhere"):
        ConceptExtractor(ConceptIndex.build(VOCABULARY), ExtractorOptions(pipeline="en_core_sci_nowhere"))


def test_entities_of_a_pipeline_are_linked_too(tmp_path: Path) -> None:
    import spacy

    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "ENTITY", "pattern": "the glioblastoma multiformes tumor"}])
    nlp.to_disk(tmp_path / "pipeline")
    index = ConceptIndex.build(VOCABULARY)
    options = ExtractorOptions(similar_spelling=False, pipeline=str(tmp_path / "pipeline"), min_similarity=0.7)
    caption = "CT of the glioblastoma multiformes tumor"
    assert ("CT", "C2") in found(ConceptExtractor(index, options), caption)
    assert any(cui == "C6" for _, cui in found(ConceptExtractor(index, options), caption))


# --- captions as they come ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " ",
        "\x00\x01\x02",
        "\ud800 lone surrogate",
        "a \ud800 (LS) in a word before an abbreviation",
        "\u202eفحص lung בדיקה",
        "(" * 3000,
        "((a) (b",
        "🫁" * 50,
        "1.5 × 2",
    ],
)
def test_odd_captions_give_mentions_or_none(small: ConceptExtractor, caption: str) -> None:
    for mention in small.extract([caption])[0]:
        assert caption[mention.start_char : mention.end_char] == "lung"


def test_a_caption_of_fifty_thousand_characters_is_read_to_its_end(small: ConceptExtractor) -> None:
    caption = "normal text of the figure (FIG) " * 1600 + "pneumothorax"
    assert len(caption) > 50_000
    assert found(small, caption)[-1] == ("pneumothorax", "C1")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("gap", [" " * 50_000 + ".", "\u00a0" * 50_000 + "!", "-" * 50_000])
def test_hostile_gaps_between_words_take_time_in_proportion(small: ConceptExtractor, gap: str) -> None:
    assert found(small, f"lung{gap}lung") == [("lung", "C3"), ("lung", "C3")]


@pytest.mark.parametrize("mention", ["pneumo\u00adthorax", "lung\u2003nodule", "lung\u200b nodule", "lung\u200bnodule"])
def test_invisible_characters_and_odd_spaces_inside_a_mention_do_not_matter(
    small: ConceptExtractor, mention: str
) -> None:
    assert [text for text, _ in found(small, f"A {mention}.")] == [mention]


def test_what_lies_behind_the_longest_caption_is_not_read(small: ConceptExtractor) -> None:
    assert found(small, "x " * (MAX_CAPTION_CHARS // 2) + "lung") == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["lung", "nodule", "collapsed", "CT", "PN", " ", " ", "(", ")", "[", "]", "-", ".", ",", "’s", "no "]
        )
        | st.characters(),  # of any script, control characters and halves of surrogate pairs among them
        max_size=40,
    ).map("".join)
)
def test_spans_are_ordered_inside_the_caption_and_do_not_overlap(caption: str) -> None:
    extractor = _cached()
    end = 0
    for mention in extractor.extract([caption])[0]:
        assert end <= mention.start_char < mention.end_char <= len(caption)
        assert not unicodedata.category(caption[mention.start_char]).startswith("Z")
        words = split_words(caption[mention.start_char : mention.end_char])
        assert words.spans[0][0] == 0 and words.spans[-1][1] == mention.end_char - mention.start_char  # noqa: PT018
        end = mention.end_char


def _cached() -> ConceptExtractor:
    if not hasattr(_cached, "extractor"):
        _cached.extractor = ConceptExtractor(ConceptIndex.build(VOCABULARY))
    return _cached.extractor


def test_a_caption_gives_the_same_alone_and_among_others(shipped: ConceptExtractor) -> None:
    captions = ["Pulmonary nodule (PN) on CT.", "PN of a leaf.", "glioblastoma multiform", "CT", "no pneumothorax"]
    assert shipped.extract(captions) == [shipped.extract([caption])[0] for caption in captions]


def test_strings_of_captions_are_forgotten(small: ConceptExtractor) -> None:
    before = len(small._nlp.vocab.strings)
    small.extract([f"strange{number} word (SW{number}) here" for number in range(300)])
    assert len(small._nlp.vocab.strings) <= before + 50


# --- vocabularies and workers ---------------------------------------------------------------------------------------


def test_the_shipped_vocabulary_knows_the_ten_modalities(shipped: ConceptExtractor) -> None:
    captions = {
        "radiograph": "C1306645",
        "CT slice": "C0040405",
        "MR image": "C0024485",
        "sonogram": "C0041618",
        "mammogram": "C0024671",
        "histology section": "C0243140",
        "optical coherence tomography image": "C0920367",
        "endoscopic image": "C0014245",
    }
    for caption, cui in captions.items():
        assert found(shipped, caption) == [(caption, cui)]
    for caption in ("dermoscopy image", "fundus photograph"):
        assert len(found(shipped, caption)) == 1


def test_drawn_findings_have_private_identifiers_only_in_their_own_vocabulary(shipped: ConceptExtractor) -> None:
    from medclip_hf.data.phantoms.findings import FINDINGS

    drawn = ConceptExtractor.from_vocabulary("phantoms")
    for finding in FINDINGS:
        for name in (finding.name, *finding.synonyms):
            assert found(drawn, name) == [(name, finding.concept_id)]
            assert [text for text, cui in found(shipped, name) if not cui.startswith("P")] == [name]


def test_captions_of_the_phantoms_are_read_back(tmp_path: Path) -> None:
    import numpy as np

    from medclip_hf.data.phantoms.captions import DrawnPlace, write_caption
    from medclip_hf.data.phantoms.findings import FINDINGS
    from medclip_hf.data.phantoms.looks import LOOKS

    drawn = ConceptExtractor.from_vocabulary("phantoms")
    rng = np.random.default_rng(0)
    for _ in range(100):
        places = [DrawnPlace(FINDINGS[n], (0.0, 0.0)) for n in rng.choice(len(FINDINGS), 2, replace=False)]
        caption, truth = write_caption(LOOKS[int(rng.integers(len(LOOKS)))], places, rng)
        affirmed = [m for m in drawn.extract([caption])[0] if not m.is_negated]
        assert {(m.cui, m.start_char, m.end_char) for m in truth} == {
            (m.cui, m.start_char, m.end_char) for m in affirmed
        }


def test_an_index_is_kept_beside_its_vocabulary_and_follows_its_changes(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "mine.jsonl")
    assert found(ConceptExtractor.from_vocabulary(path), "lung") == [("lung", "C3")]
    (first,) = [folder for folder in (tmp_path / "mine.jsonl.index").iterdir() if folder.is_dir()]
    ConceptExtractor.from_vocabulary(path)
    assert [folder for folder in (tmp_path / "mine.jsonl.index").iterdir() if folder.is_dir()] == [first]
    write_vocabulary(path, (Concept("N1", "Lung"),))
    os.utime(path, ns=(1, 1))
    assert found(ConceptExtractor.from_vocabulary(path), "lung") == [("lung", "N1")]


def test_a_pickled_extractor_is_a_path_to_shared_arrays(tmp_path: Path) -> None:
    import numpy as np

    extractor = ConceptExtractor.from_vocabulary(write_vocabulary(tmp_path / "mine.jsonl"), min_similarity=0.9)
    content = pickle.dumps(extractor)
    assert len(content) < 1000
    other = pickle.loads(content)
    assert isinstance(other.index.hashes, np.memmap)
    assert other.options == extractor.options
    assert found(other, "CT of the lung") == found(extractor, "CT of the lung")


def test_a_process_of_its_own_finds_what_this_one_finds(tmp_path: Path) -> None:
    extractor = ConceptExtractor.from_vocabulary(write_vocabulary(tmp_path / "mine.jsonl"))
    (tmp_path / "extractor.pickle").write_bytes(pickle.dumps(extractor))
    program = (
        "import pickle, sys; extractor = pickle.load(open(sys.argv[1], 'rb'));"
        "print([(m.cui, m.start_char, m.is_negated) for m in extractor.extract(['no pneumothorax on CT'])[0]])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "extractor.pickle")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[('C1', 3, True), ('C2', 19, False)]"


def test_a_vocabulary_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="no vocabulary nowhere"):
        ConceptExtractor.from_vocabulary("nowhere.jsonl")


def test_published_spans_are_found_where_the_vocabulary_has_their_words(
    shipped: ConceptExtractor, real_data: Path
) -> None:
    from medclip_hf.data.offsets import DecodedCaption

    covered = hits = 0
    for line in (real_data / "pmc_sample" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        decoded = DecodedCaption(row["caption"])
        ours = {(m.start_char, m.end_char) for m in shipped.extract([row["caption"]])[0]}
        for concept in row["umls_meta_info"]:
            span = decoded.raw_span(concept["start_char"], concept["end_char"], concept["tokens"])
            text = row["caption"][slice(*span)]
            if [mention for mention, _ in found(shipped, text)] == [text]:
                covered += 1
                hits += span in ours
    assert covered > 150
    assert hits / covered > 0.9
