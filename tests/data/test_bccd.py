"""Blood smears: what is read, what is set aside, and whether a window's caption is true of it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medclip_hf.data.bccd import (
    CELL_KINDS,
    BloodSmear,
    CellBox,
    cut_windows,
    parse_boxes,
    read_smears,
    write_bccd,
    write_caption,
)
from medclip_hf.data.stages import Drop


def annotation(*cells, size=(64, 48)):
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for name, *box in cells
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"


@pytest.fixture
def source(tmp_path):
    """Four pictures of 64 × 48: two for training, one each for validation and test."""
    folder = tmp_path / "bccd"
    for name in ("annotations", "images", "splits"):
        (folder / name).mkdir(parents=True)
    for number in range(4):
        pixels = np.full((48, 64, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"smear{number}.jpg")
        text = annotation(("WBC", 1, 1, 32, 24), ("RBC", 41, 25, 60, 44), ("RBC", 0, 0, 0, 0))
        (folder / "annotations" / f"smear{number}.xml").write_text(text)
    for file, names in {"train.txt": "smear0\nsmear1\n", "val.txt": "smear2\n", "test.txt": "smear3\n"}.items():
        (folder / "splits" / file).write_text(names)
    return folder


def test_boxes_count_from_zero_and_those_without_area_are_left_out():
    boxes = parse_boxes(
        annotation(("RBC", 1, 1, 10, 20), ("WBC", 60, 40, 70, 60), ("RBC", 0, 0, 0, 0)).encode(), (64, 48)
    )
    assert boxes == (CellBox("RBC", 0, 0, 10, 20), CellBox("WBC", 59, 39, 64, 48))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotation>", "no XML"),
        (annotation(size=(640, 480)), "picture of 640 × 480"),
        (annotation(("Eosinophil", 1, 1, 2, 2)), "'Eosinophil'"),
        (annotation(("RBC", "x", 1, 2, 2)), "not four numbers"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + annotation(), "document type"),
    ],
)
def test_an_annotation_that_cannot_be_trusted_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_boxes(text.encode(), (64, 48))


def test_a_caption_counts_the_cells_and_its_spans_are_the_names():
    caption, concepts = write_caption(["RBC"] * 14 + ["WBC"])
    assert caption == "Blood smear. Leukocytes: 1. Erythrocytes: many."
    assert [caption[c.start_char : c.end_char] for c in concepts] == ["Leukocytes", "Erythrocytes"]
    assert [c.cui for c in concepts] == ["C0023516", "C0014792"]
    assert write_caption([]) == ("Blood smear. No cells.", ())


def test_what_cannot_be_read_is_set_aside_with_its_reason(source):
    (source / "images" / "smear0.jpg").write_bytes(b"not a picture")
    (source / "annotations" / "smear1.xml").write_text("<annotation>")
    smears = list(read_smears(source, "train"))
    assert [(type(smear), smear.reason, smear.row_id) for smear in smears] == [
        (Drop, "image not recognised", "smear0"),
        (Drop, "annotation unreadable", "smear1"),
    ]
    with pytest.raises(ValueError, match="no picture of the split 'train'"):
        write_bccd(source, source.parent / "figures", splits=["train"])


def test_a_picture_in_two_lists_is_refused(source):
    (source / "splits" / "test.txt").write_text("smear0\n")
    with pytest.raises(ValueError, match="smear0"):
        list(read_smears(source, "test"))
    with pytest.raises(ValueError, match="split must be one of"):
        list(read_smears(source, "dev"))
    (source / "splits" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"val\.txt is missing"):
        list(read_smears(source, "validation"))


def test_a_name_cannot_climb_out_of_the_folder(source):
    (source / "splits" / "test.txt").write_text("../../secret\n")
    [smear] = read_smears(source, "test")
    assert smear.reason == "image path outside its folder"


def test_whole_photographs_become_figures(source, tmp_path):
    tallies = write_bccd(source, tmp_path / "figures", splits=["train"])
    rows = pq.read_table(tmp_path / "figures" / "train-00000.parquet").to_pylist()
    assert tallies["train"].kept == len(rows) == 2
    assert rows[0]["caption"] == "Blood smear. Leukocytes: 1. Erythrocytes: 1."
    assert rows[0]["image"]["bytes"] == (source / "images" / "smear0.jpg").read_bytes()


def coloured_smear():
    """A grey picture with one blue white cell, one red cell and one green platelet, far apart."""
    pixels = np.full((240, 320, 3), 128, np.uint8)
    boxes = (
        CellBox("WBC", 20, 20, 100, 100),
        CellBox("RBC", 200, 40, 260, 100),
        CellBox("Platelets", 120, 180, 150, 210),
    )
    for box, colour in zip(boxes, ((0, 0, 255), (255, 0, 0), (0, 255, 0)), strict=True):
        pixels[box.top : box.bottom, box.left : box.right] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return BloodSmear("smear", buffer.getvalue(), 320, 240, boxes)


def test_a_window_shows_what_its_caption_names_and_nothing_else():
    rows = list(cut_windows(coloured_smear(), 60, (64, 200), 32, np.random.default_rng(0)))
    assert len({row.caption for row in rows}) >= 5  # of seven sets of kinds
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row.image_bytes))).astype(int)
        named = {concept.cui for concept in row.concepts}
        for kind, channel in zip(CELL_KINDS, (2, 0, 1), strict=True):
            others = [c for c in range(3) if c != channel]
            share = (pixels[..., channel] - pixels[..., others].max(axis=-1) > 100).mean()
            # Of a cell that is not named, at most a twelfth may show.
            assert share > 0.01 if kind.cui in named else share < 0.13, (row.caption, kind.name, share)


def test_the_same_seed_gives_the_same_windows(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_bccd(source, tmp_path / name, splits=["train"], windows_per_image=4, window_sides=(16, 40), seed=seed)
    rows = {name: pq.read_table(tmp_path / name / "train-00000.parquet").to_pylist() for name in "abc"}
    assert rows["a"] == rows["b"] != rows["c"]


def test_the_mask_of_a_kind_is_the_union_of_its_boxes():
    smear = coloured_smear()
    assert smear.mask("RBC").sum() == 60 * 60
    assert smear.mask("RBC")[40:100, 200:260].all()
    with pytest.raises(ValueError, match="unknown kind"):
        smear.mask("Eosinophil")


def test_senseless_windows_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="window_sides"):
        write_bccd(source, tmp_path / "figures", windows_per_image=1, window_sides=(100, 50))


def test_the_real_lists_are_read_whole(real_data):
    smears = list(read_smears(real_data / "bccd", "test"))
    assert len(smears) == 72
    assert all(isinstance(smear, BloodSmear) for smear in smears)
    assert sum(len(smear.boxes) for smear in smears) > 900
