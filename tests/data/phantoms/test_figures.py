"""The drawn 2-D data set: deterministic, true in its masks and spans, written through the Parquet contract."""

import hashlib
import io
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.phantoms.captions import NEGATIONS
from medclip_hf.data.phantoms.figures import MAX_FINDINGS, draw_figure, draw_figures, write_figure_phantoms
from medclip_hf.data.phantoms.findings import FINDINGS
from medclip_hf.data.phantoms.looks import LOOKS, unit_grid

NUM_FIGURES = 150


@pytest.fixture(scope="module")
def figures():
    return list(draw_figures(seed=3, split="train", count=NUM_FIGURES))


def test_a_figure_does_not_depend_on_what_was_drawn_before(figures):
    alone = draw_figure(seed=3, split="train", index=77)
    assert np.array_equal(alone.image, figures[77].image)
    assert np.array_equal(alone.masks, figures[77].masks)
    assert alone.row == figures[77].row


def test_another_process_draws_the_same_figure(figures):
    program = (
        "import hashlib; from medclip_hf.data.phantoms.figures import draw_figure as d; "
        "f = d(3, 'train', 5); print(hashlib.sha256(f.image.tobytes() + f.row.caption.encode()).hexdigest())"
    )
    here = hashlib.sha256(figures[5].image.tobytes() + figures[5].row.caption.encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


@pytest.mark.parametrize(("seed", "split"), [(4, "train"), (3, "test")])
def test_another_seed_or_split_draws_other_figures(figures, seed, split):
    other = list(draw_figures(seed, split, 20))
    assert not {figure.row.image_bytes for figure in other} & {figure.row.image_bytes for figure in figures}
    assert not {figure.row.row_id for figure in other} & {figure.row.row_id for figure in figures}


def test_every_span_holds_a_wording_of_its_concept(figures):
    wordings = {finding.concept_id: {finding.name, *finding.synonyms} for finding in FINDINGS}
    for figure in figures:
        for concept in figure.row.concepts:
            mention = figure.row.caption[concept.start_char : concept.end_char]
            assert mention.lower() in {wording.lower() for wording in wordings[concept.cui]}


def test_concepts_are_exactly_the_findings_in_the_picture(figures):
    for figure in figures:
        assert sorted(concept.name for concept in figure.row.concepts) == sorted(figure.findings)
        assert 1 <= len(figure.findings) <= MAX_FINDINGS


def test_a_denied_finding_is_neither_in_the_picture_nor_a_concept(figures):
    starts = tuple(text.split("{finding}")[0] for text in NEGATIONS if not text.startswith("{"))
    num_denied = 0
    for figure in figures:
        for sentence in figure.row.caption.split(". "):
            if sentence.startswith(starts):
                num_denied += 1
                assert not any(name in sentence for name in figure.findings)
    assert num_denied >= 5


def test_masks_of_a_figure_are_filled_and_do_not_overlap(figures):
    for figure in figures:
        assert figure.masks.shape == (len(figure.findings), 64, 64)
        assert figure.masks.sum(axis=0).max() == 1
        assert (figure.masks.sum(axis=(1, 2)) > 20).all()


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_a_finding_changes_the_picture_inside_its_mask_alone(finding):
    x, y = unit_grid(64)
    contrast, region = finding.paint(x * 1.5, y * 1.5, 1.5 * 2.0 / 64, np.random.default_rng(0))
    inside, outside = np.abs(contrast[region > 0.5]).mean(), np.abs(contrast[region == 0.0]).max()
    assert inside > 0.1
    assert outside < 1e-6


def test_all_looks_and_findings_are_drawn(figures):
    assert {figure.row.modality for figure in figures} == {look.modality for look in LOOKS}
    assert {name for figure in figures for name in figure.findings} == {finding.name for finding in FINDINGS}


def test_a_larger_picture_shows_larger_regions():
    small, large = draw_figure(0, "train", 1, size=64), draw_figure(0, "train", 1, size=128)
    assert large.image.shape == (128, 128, 3)
    assert large.masks.sum() == pytest.approx(4 * small.masks.sum(), rel=0.15)


def test_shards_hold_the_columns_that_trainers_and_evaluation_read(tmp_path, figures):
    shards = write_figure_phantoms(tmp_path / "set", {"train": 5, "test": 2}, seed=3, rows_per_shard=3)
    assert [path.name for path in shards] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "test-00000-of-00001.parquet",
    ]
    rows = datasets.Dataset.from_parquet([str(path) for path in shards[:2]], cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows["row_id"] == [figure.row.row_id for figure in figures[:5]]
    assert np.array_equal(np.asarray(rows[4]["image"]), figures[4].image)
    assert rows[4]["concepts"][0] == {
        "cui": figures[4].row.concepts[0].cui,
        "name": figures[4].row.concepts[0].name,
        "start_char": figures[4].row.concepts[0].start_char,
        "end_char": figures[4].row.concepts[0].end_char,
        "similarity": 1.0,
        "semantic_type": "Finding",
        "is_negated": False,
        "is_uncertain": False,
    }
    masks = np.stack([np.asarray(mask) > 0 for mask in rows[4]["finding_masks"]])
    assert np.array_equal(masks, figures[4].masks)
    assert tuple(rows[4]["findings"]) == figures[4].findings


def test_the_picture_in_the_row_is_a_png_of_the_image(figures):
    with Image.open(io.BytesIO(figures[0].row.image_bytes)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), figures[0].image)


def test_rows_are_plain_data(figures):
    json.dumps([vars(concept) for concept in figures[0].row.concepts])


def test_existing_shards_are_not_overwritten(tmp_path):
    write_figure_phantoms(tmp_path, {"train": 1})
    with pytest.raises(FileExistsError, match="train-00000-of-00001"):
        write_figure_phantoms(tmp_path, {"train": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "train, validation, test"),
        ({"index": -1}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"size": 8}, "at least 32"),
    ],
)
def test_arguments_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_figure(**{"seed": 0, "split": "train", "index": 0, **arguments})


@pytest.mark.parametrize("counts", [{}, {"train": 0}])
def test_an_empty_split_is_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="at least one row"):
        write_figure_phantoms(tmp_path, counts)


def test_an_unknown_split_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="train, validation, test"):
        write_figure_phantoms(tmp_path, {"train": 1, "dev": 1})
    assert not list(tmp_path.iterdir())
