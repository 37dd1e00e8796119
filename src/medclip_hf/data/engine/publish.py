"""A finished data set to the Hub, private unless said otherwise, and back as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import HfApi

from medclip_hf.data.parquet import record_to_row
from medclip_hf.data.records import FigureRow

PUBLISHED_FILES = ["*.parquet", "*.manifest.json", "README.md", "data_card.html", "contact_sheet.jpg"]


def push_data_set(folder: Path, repository: str, *, is_public: bool = False, api: HfApi | None = None) -> str:
    """The address of the data set on the Hub, once its shards and its card are there.

    Only the data set travels: no intermediate file, no list of drops, no report with paths.

    Args:
        folder: of a finished run.
        repository: ``owner/name``.
        is_public: whether everybody may read it.
        api: to reach the Hub with; by default with the token of the environment.

    Raises:
        ValueError: where the run has not finished.
    """
    if not (folder / "report.json").exists():
        raise ValueError(f"{folder} holds no finished data set: run the engine to its end before pushing")
    api = api or HfApi()
    address = api.create_repo(repository, repo_type="dataset", private=not is_public, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=PUBLISHED_FILES,
        commit_message="Upload the data set",
    )
    return str(address)


def stream_figure_rows(repository: str | Path, split: str = "train") -> Iterator[FigureRow]:
    """The rows of a data set on the Hub or in a folder, one after another, without a copy on disk."""
    stream = load_dataset(str(repository), split=split, streaming=True)
    for record in stream.decode(False):
        yield record_to_row(record)
