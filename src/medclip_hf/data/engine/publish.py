"""Which files of a data set go to the Hub, and its rows back as a stream; `hub.push` does the sending."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset

from medclip_hf.data.parquet import record_to_row
from medclip_hf.data.records import FigureRow

# No intermediate file, no list of drops, no report with paths.
PUBLISHED_FILES = ["*.parquet", "*.manifest.json", "README.md", "data_card.html", "contact_sheet.jpg"]


def stream_figure_rows(repository: str | Path, split: str = "train") -> Iterator[FigureRow]:
    """The rows of a data set on the Hub or in a folder, one after another, without a copy on disk."""
    stream = load_dataset(str(repository), split=split, streaming=True)
    for record in stream.decode(False):
        yield record_to_row(record)
