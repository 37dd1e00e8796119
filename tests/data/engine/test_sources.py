"""Tables of images and captions as they come: what is read, what is dropped, what is refused before the work begins."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medclip_hf.data.engine.sources import TableSource
from medclip_hf.data.stages import Drop


def picture():
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    return tmp_path


def read(path):
    """Caption of every row, reason of every drop."""
    source = TableSource(path)
    outcomes = [outcome for item in source.list_items() for outcome in source.read(item)]
    return [outcome.reason if isinstance(outcome, Drop) else outcome.caption for outcome in outcomes]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"image;caption\na.png;A CT.\n"),
        ("t.csv", "image,caption\na.png,A CT.\n".encode("utf-16")),
        ("t.tsv", b"picture\tlegend\na.png\tA CT.\n"),
        ("t.csv", b""),
        ("t.jsonl.gz", b"\x1f\x8b"),
        ("t.xlsx", b"PK"),
        ("t.parquet", b"PAR1 and nothing else"),
    ],
)
def test_a_table_without_the_columns_or_of_another_format_is_refused_naming_the_file(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read(folder / name)


def test_a_suffix_in_capitals_and_a_byte_order_mark_do_not_matter(folder):
    (folder / "T.CSV").write_bytes("image,caption\na.png,Röntgen\n".encode("utf-8-sig"))
    assert read(folder / "T.CSV") == ["Röntgen"]


def test_a_line_in_another_encoding_is_dropped_and_the_others_read(folder):
    (folder / "t.csv").write_bytes(b"image,caption\na.png,R\xf6ntgen\na.png,A CT.\n")
    assert read(folder / "t.csv") == ["line not readable", "A CT."]


def test_a_name_that_no_file_can_have_is_an_image_that_is_missing(folder):
    (folder / "t.jsonl").write_text('{"image": "\\ud800.png", "caption": "A CT."}\n')
    assert read(folder / "t.jsonl") == ["image missing"]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(["a.png"]).dictionary_encode(), "caption": pa.array(["A CT."]).dictionary_encode()},
        {"image": pa.array(["a.png"], pa.large_string()), "caption": pa.array(["A CT."], pa.string_view())},
        {"image": pa.array([picture()], pa.large_binary()), "caption": ["A CT."]},
        {"image": [{"bytes": None, "path": "a.png"}], "text": ["A CT."]},
    ],
)
def test_text_and_images_of_parquet_are_read_in_every_encoding(folder, columns):
    pq.write_table(pa.table(columns), folder / "t.parquet")
    assert read(folder / "t.parquet") == ["A CT."]


@pytest.mark.parametrize(
    "columns", [{"image": [[1, 2]], "caption": ["A CT."]}, {"image": ["a.png"], "caption": [["A"]]}]
)
def test_columns_of_lists_are_no_images_and_no_captions(folder, columns):
    pq.write_table(pa.table(columns), folder / "t.parquet")
    with pytest.raises(ValueError, match="has no column"):
        read(folder / "t.parquet")
