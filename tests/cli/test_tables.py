"""Rows in every format, and a file that appears only when it is complete."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from medclip_hf.cli.tables import FORMATS, format_of, open_table

COLUMNS = {"file": "text", "flags": "texts", "score": "number", "rank": "integer", "vector": "vector"}
ROWS = [
    {"file": "a, b.png", "flags": ["one", "two"], "score": 0.5, "rank": 1, "vector": np.array([1, 2], np.float32)},
    {"file": "c.png", "flags": [], "score": None, "rank": 2, "vector": None},
]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_rows(tmp_path, name):
    path = tmp_path / f"table.{name}"
    with open_table(str(path), name, COLUMNS) as table:
        for row in ROWS:
            table.write(row)
    plain = [{**row, "vector": None if row["vector"] is None else row["vector"].tolist()} for row in ROWS]
    if name == "csv":
        assert path.read_text() == (
            'file,flags,score,rank,vector_0,vector_1\n"a, b.png",one; two,0.5,1,1,2\nc.png,,,2,,\n'
        )
    elif name == "parquet":
        assert pq.read_table(path).to_pylist() == plain
    elif name == "json":
        assert json.loads(path.read_text()) == plain
    else:
        assert [json.loads(line) for line in path.read_text().splitlines()] == plain


def test_the_header_waits_for_a_row_that_tells_the_width_of_a_vector(tmp_path):
    """The first anatomies of a scan may have no embedding."""
    columns = {"file": "text", "vector": "vector", "place": "vector"}
    rows = [("a", None, None), ("b", [1, 2], None), ("c", None, [3]), ("d", None, None)]
    with open_table(str(tmp_path / "table.csv"), "csv", columns) as table:
        for row in rows:
            table.write(dict(zip(columns, row, strict=True)))
    assert (tmp_path / "table.csv").read_text() == "file,vector_0,vector_1,place_0\na,,,\nb,1,2,\nc,,,3\nd,,,\n"
    with open_table(str(tmp_path / "none.csv"), "csv", columns) as table:
        table.write(dict(zip(columns, rows[0], strict=True)))
    assert (tmp_path / "none.csv").read_text() == "file,vector,place\na,,\n"


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_without_rows_is_a_table(tmp_path, name):
    with open_table(str(tmp_path / "empty"), name, COLUMNS):
        pass
    if name == "parquet":
        assert pq.read_table(tmp_path / "empty").column_names == list(COLUMNS)
    elif name == "json":
        assert json.loads((tmp_path / "empty").read_text()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_an_error_leaves_neither_table_nor_part_of_it(tmp_path, name):
    with pytest.raises(KeyError), open_table(str(tmp_path / "table"), name, COLUMNS) as table:
        table.write({"file": "a row without the other columns"})
    assert list(tmp_path.iterdir()) == []


def test_the_format_follows_from_the_ending_unless_it_is_told(tmp_path):
    assert format_of("a.parquet", None) == "parquet"
    assert format_of("-", None) == "csv"
    assert format_of("a.txt", "jsonl") == "jsonl"
    with pytest.raises(ValueError, match="is a folder: name a file"):
        format_of(str(tmp_path), "csv")
    with pytest.raises(ValueError, match=r"a\.txt: the format 'txt' is not known"):
        format_of("a.txt", None)
