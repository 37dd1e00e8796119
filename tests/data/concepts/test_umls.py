"""A UMLS release becomes a vocabulary: preferred names first, suppressed names out, memory bounded by one concept."""

from pathlib import Path

import pytest

from medclip_hf.data.concepts.index import Concept, read_vocabulary
from medclip_hf.data.concepts.umls import read_umls, write_umls_vocabulary


def name(
    cui: str, text: str, language: str = "ENG", status: str = "S", source: str = "MSH", suppress: str = "N"
) -> str:
    preferred = "PF" if status == "P" else "VO"
    return f"{cui}|{language}|{status}|L1|{preferred}|S1|Y|A1||M1|D1|{source}|PT|D1|{text}|0|{suppress}|256|\n"


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    (tmp_path / "MRCONSO.RRF").write_text(
        name("C0000001", "lungs")
        + name("C0000001", "Lung", status="P")
        + name("C0000001", "Lunge", language="GER")
        + name("C0000001", "Lung, NOS", suppress="O")
        + name("C0000003", "Cyst", status="P", source="SNOMEDCT_US"),
        encoding="utf-8",
    )
    (tmp_path / "MRSTY.RRF").write_text(
        "C0000001|T023|A1.2.3.1|Body Part, Organ, or Organ Component|AT1|256|\n"
        "C0000002|T047|B2.2.1.2.1|Disease or Syndrome|AT2|256|\n"
        "C0000003|T033|A2.2|Finding|AT3||\nC0000003|T190|A1.2.2.2|Anatomical Abnormality|AT4||\n",
        encoding="utf-8",
    )
    return tmp_path


def test_concepts_have_their_preferred_name_first_and_their_types(meta: Path) -> None:
    assert list(read_umls(meta)) == [
        Concept("C0000001", "Lung", ("lungs",), ("T023",)),
        Concept("C0000003", "Cyst", (), ("T033", "T190")),
    ]


def test_the_written_vocabulary_reads_back(meta: Path) -> None:
    assert write_umls_vocabulary(meta, meta / "umls.jsonl") == 2
    assert list(read_vocabulary(meta / "umls.jsonl")) == list(read_umls(meta))


def test_sources_and_languages_can_be_chosen(meta: Path) -> None:
    assert [concept.name for concept in read_umls(meta, sources=("SNOMEDCT_US",))] == ["Cyst"]
    assert [concept.name for concept in read_umls(meta, language="GER")] == ["Lunge"]


def test_a_choice_that_leaves_nothing_is_refused(meta: Path) -> None:
    with pytest.raises(ValueError, match="no name of language 'XXX'"):
        write_umls_vocabulary(meta, meta / "umls.jsonl", language="XXX")
    assert not (meta / "umls.jsonl").exists()


def test_a_folder_without_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MRSTY\.RRF"):
        list(read_umls(tmp_path))


def test_a_line_with_other_columns_is_named(meta: Path) -> None:
    with (meta / "MRCONSO.RRF").open("a") as file:
        file.write("C0000009|ENG|\n")
    with pytest.raises(ValueError, match=r"MRCONSO\.RRF, line 6: 2 columns"):
        list(read_umls(meta))


def test_an_unsorted_file_is_refused(meta: Path) -> None:
    with (meta / "MRCONSO.RRF").open("a") as file:
        file.write(name("C0000001", "Lung again"))
    with pytest.raises(ValueError, match="not sorted"):
        list(read_umls(meta))
