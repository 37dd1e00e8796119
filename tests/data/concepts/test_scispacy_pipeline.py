"""scispaCy's own index in place of ours gives the same links."""

import json
from pathlib import Path

import pytest

from medclip_hf.data.concepts.extraction import ConceptExtractor, ExtractorOptions
from medclip_hf.data.concepts.index import Concept, ConceptIndex

pytest.importorskip("spacy")
nmslib = pytest.importorskip("nmslib")
candidate_generation = pytest.importorskip("scispacy.candidate_generation")

VOCABULARY = (
    Concept("C1", "Glioblastoma multiforme", ("malignant glioma",), ("T191",)),
    Concept("C2", "Pneumothorax", ("collapsed lung",), ("T046",)),
    Concept("C3", "Pancreatic ductal adenocarcinoma", (), ("T191",)),
)


@pytest.fixture(scope="module")
def linker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files of a scispaCy linker, made as scispaCy makes them."""
    import joblib
    import numpy as np
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    folder = tmp_path_factory.mktemp("linker")
    names = sorted({name for concept in VOCABULARY for name in (concept.name, *concept.aliases)})
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), min_df=1, dtype=np.float32)
    vectors = vectorizer.fit_transform(names)
    index = nmslib.init(method="hnsw", space="cosinesimil_sparse", data_type=nmslib.DataType.SPARSE_VECTOR)
    index.addDataPointBatch(vectors)
    index.createIndex({"M": 10, "efConstruction": 50, "post": 0, "indexThreadQty": 1}, print_progress=False)
    paths = candidate_generation.LinkerPaths.from_directory(folder)
    joblib.dump(vectorizer, paths.tfidf_vectorizer)
    Path(paths.concept_aliases_list).write_text(json.dumps(names))
    scipy.sparse.save_npz(paths.tfidf_vectors, vectors)
    index.saveIndex(paths.ann_index)
    return folder


@pytest.mark.parametrize(
    ("caption", "cuis"),
    [
        ("a glioblastoma multiform and no pneumothoraxe", ["C1", "C2"]),
        ("Pancreatic ductal adenocarcinomas (PDAC). PDAC grew.", ["C3", "C3", "C3"]),
        ("nothing here is known", []),
        ("", []),
    ],
)
def test_scispacy_s_index_links_as_ours_does(linker_folder: Path, caption: str, cuis: list[str]) -> None:
    index = ConceptIndex.build(VOCABULARY)
    for options in (ExtractorOptions(), ExtractorOptions(scispacy_index=str(linker_folder))):
        assert [mention.cui for mention in ConceptExtractor(index, options).extract([caption])[0]] == cuis


def test_a_missing_file_is_named_and_nothing_downloaded(tmp_path: Path) -> None:
    options = ExtractorOptions(scispacy_index=str(tmp_path))
    with pytest.raises(ValueError, match=r"nmslib_index\.bin"):
        ConceptExtractor(ConceptIndex.build(VOCABULARY), options)
