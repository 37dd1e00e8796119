"""The card of a data set of figures: what is in it, in Markdown for the Hub and in HTML, with a sheet of examples."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from medclip_hf.data.engine.figure_images import plain_rgb
from medclip_hf.data.engine.settings import short_digest
from medclip_hf.data.images import UnreadableImage, decode_image, open_image
from medclip_hf.data.parquet import SPLITS, write_text_atomically

LENGTH_EDGES = (0, 10, 25, 50, 100, 200, 400)  # words
MAX_TABLE_ROWS = 25
NUM_EXAMPLES = 24
THUMBNAIL_SIDE = 200  # pixels
EXAMPLES_PER_ROW = 6
NAMES_AT_ONCE = 500_000

Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows


class DistinctCount:
    """How many different names were added, at 8 bytes each: a set of six million texts takes a gigabyte."""

    def __init__(self) -> None:
        self._known = np.zeros(0, np.uint64)
        self._new: list[int] = []

    def add(self, name: str) -> None:
        """Count a name, if it is new."""
        self._new.append(short_digest(name))
        if len(self._new) >= NAMES_AT_ONCE:
            self._merge()

    def __len__(self) -> int:
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        self._known = np.union1d(self._known, np.array(self._new, np.uint64))
        self._new = []


@dataclass
class DataSummary:
    """Counts over a data set, taken row by row."""

    figures: Counter[str] = field(default_factory=Counter)  # by split
    articles: DistinctCount = field(default_factory=lambda: DistinctCount())
    licenses: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    concepts: Counter[str] = field(default_factory=Counter)  # by concept, "name (cui)"
    caption_words: Counter[str] = field(default_factory=Counter)  # by range
    num_mentions: int = 0
    num_negated: int = 0
    num_compound: int = 0
    num_words: int = 0

    def add(self, split: str, record: dict[str, Any]) -> None:
        """Count one row."""
        self.figures[split] += 1
        if record["pmcid"]:
            self.articles.add(record["pmcid"])
        self.licenses[record["license"] or "not stated"] += 1
        self.modalities[record["modality"] or "not named"] += 1
        self.num_compound += bool(record.get("is_compound"))
        num_words = len(record["caption"].split())
        self.num_words += num_words
        self.caption_words[_length_range(num_words)] += 1
        for concept in record["concepts"] or ():
            self.num_mentions += 1
            self.num_negated += concept["is_negated"]
            self.concepts[f"{concept['name']} ({concept['cui']})" if concept["cui"] else concept["name"]] += 1


def summarise(folder: Path) -> DataSummary:
    """Counts over all splits of a data set; the images are not read."""
    summary = DataSummary()
    columns = ["caption", "concepts", "pmcid", "license", "modality", "is_compound"]
    for split in SPLITS:
        for shard in sorted(folder.glob(f"{split}-*.parquet")):
            for batch in pq.ParquetFile(shard).iter_batches(1000, columns=columns):
                for record in batch.to_pylist():
                    summary.add(split, record)
    return summary


def write_data_card(folder: Path, title: str, report: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write `README.md`, `data_card.html` and `contact_sheet.jpg` beside the shards.

    Args:
        folder: of a data set whose shards are all written.
        title: of the card.
        report: of the engine, as plain values.
        settings: of the engine, as plain values without paths.
    """
    summary = summarise(folder)
    tables = _tables(summary, report)
    sheet = contact_sheet(folder)
    if sheet is not None:
        temporary = folder / ".contact_sheet.jpg.tmp"
        temporary.write_bytes(sheet)
        temporary.replace(folder / "contact_sheet.jpg")
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_text_atomically(folder / "README.md", _markdown(title, summary, tables, recipe, sheet is not None))
    write_text_atomically(folder / "data_card.html", _html(title, tables, recipe, sheet))


def contact_sheet(folder: Path) -> bytes | None:
    """A JPEG of some figures of the training set, those whose names have the lowest digests; None where there are none.

    The choice is the same for the same data set, and spreads over all of it.
    """
    chosen: list[tuple[int, Path, int]] = []
    for shard in sorted(folder.glob(f"{SPLITS[0]}-*.parquet")):
        names = pq.read_table(shard, columns=["row_id"])["row_id"].to_pylist()
        ranked = sorted((short_digest(name), shard, number) for number, name in enumerate(names))
        chosen = sorted(chosen + ranked[:NUM_EXAMPLES])[:NUM_EXAMPLES]
    thumbnails = [image for _, shard, number in chosen if (image := _thumbnail(shard, number)) is not None]
    if not thumbnails:
        return None
    num_lines = -(-len(thumbnails) // EXAMPLES_PER_ROW)
    cell = THUMBNAIL_SIDE + 8
    sheet = Image.new("RGB", (EXAMPLES_PER_ROW * cell, num_lines * cell), "white")
    for place, image in enumerate(thumbnails):
        line, column = divmod(place, EXAMPLES_PER_ROW)
        sheet.paste(image, (column * cell + (cell - image.width) // 2, line * cell + (cell - image.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _thumbnail(shard: Path, number: int) -> Image.Image | None:
    with pq.ParquetFile(shard) as file:
        start = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if number < start + num_rows:
                record = file.read_row_group(group, columns=["image"])["image"][number - start].as_py()
                break
            start += num_rows
    try:
        image = plain_rgb(decode_image(open_image(record["bytes"] or b"", "example"), "example"))
    except UnreadableImage:  # rows that name a path; those of the engine hold their image
        return None
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), reducing_gap=2.0)
    return image


def _length_range(num_words: int) -> str:
    for low, high in pairwise(LENGTH_EDGES):
        if num_words < high:
            return f"{low} to {high - 1}"
    return f"{LENGTH_EDGES[-1]} or more"


def _tables(summary: DataSummary, report: dict[str, Any]) -> list[Table]:
    num_figures = max(summary.figures.total(), 1)
    overview = [
        ["figures", f"{summary.figures.total():,}"],
        *[[f"  of them {split}", f"{summary.figures[split]:,}"] for split in SPLITS],
        ["articles", f"{len(summary.articles):,}"],
        ["concept mentions", f"{summary.num_mentions:,} ({summary.num_mentions / num_figures:.2f} a figure)"],
        ["of them negated", f"{summary.num_negated:,}"],
        ["different concepts", f"{len(summary.concepts):,}"],
        ["words a caption", f"{summary.num_words / num_figures:.1f}"],
        ["compound figures kept whole", f"{summary.num_compound:,}"],
        ["evaluation images compared with", f"{report['num_evaluation_images']:,}"],
    ]
    dropped = report["tally"]["dropped"]
    seen = report["tally"]["kept"] + sum(dropped.values())
    lengths = [_length_range(edge) for edge in LENGTH_EDGES]
    return [
        ("Overview", ["", "count"], overview),
        ("What was dropped", ["reason", "records", "share of all"], _rows(Counter(dropped), seen)),
        ("Modalities", ["modality named by the caption or the model", "figures", "share"], _rows(summary.modalities)),
        ("Licences", ["licence", "figures", "share"], _rows(summary.licenses)),
        ("Commonest concepts", ["concept", "mentions", "share"], _rows(summary.concepts)),
        (
            "Caption lengths",
            ["words", "figures", "share"],
            [[name, f"{(count := summary.caption_words[name]):,}", f"{count / num_figures:.1%}"] for name in lengths],
        ),
    ]


def _rows(counts: Counter[str], total: int | None = None) -> list[list[str]]:
    total = max(counts.total() if total is None else total, 1)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in ordered[:MAX_TABLE_ROWS]]
    if len(ordered) > MAX_TABLE_ROWS:
        rest = sum(count for _, count in ordered[MAX_TABLE_ROWS:])
        rows.append([f"{len(ordered) - MAX_TABLE_ROWS:,} more", f"{rest:,}", f"{rest / total:.1%}"])
    return rows


def _markdown(title: str, summary: DataSummary, tables: list[Table], recipe: str, has_sheet: bool) -> str:
    splits = [split for split in SPLITS if summary.figures[split]]
    header = {
        "pretty_name": title,
        "task_categories": ["zero-shot-image-classification", "image-to-text"],
        "language": ["en"],
        "tags": ["medical", "image-text", "concepts", "medclip-hf"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in splits],
            }
        ],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {_plain(title)}", ""]
    lines += [
        "Figures of articles with their captions and the concepts that the captions speak of. Every row holds the "
        "encoded image; `concepts` counts characters of `caption`: `caption[start_char:end_char]` is the mention.",
        "",
        "Every figure keeps the licence of its article (column `license`); the set as a whole has none of its own.",
        "",
    ]
    if has_sheet:
        lines += ["![Examples](contact_sheet.jpg)", ""]
    for name, columns, rows in tables:
        lines += [f"## {name}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(map(_plain, row))} |" for row in rows]
        lines += [""]
    lines += ["## Recipe", "", "```yaml", recipe.replace("```", "'''").strip(), "```", ""]
    return "\n".join(lines)


def _html(title: str, tables: list[Table], recipe: str, sheet: bytes | None) -> str:
    """One page that needs no other file; every text is escaped, for names come from articles."""
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin-bottom:2rem}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;"
        "text-align:left}td+td{text-align:right}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body><h1>{html.escape(title)}</h1>"
    ]
    if sheet is not None:
        encoded = base64.b64encode(sheet).decode("ascii")
        parts.append(f'<img alt="Examples of the training set" src="data:image/jpeg;base64,{encoded}">')
    for name, columns, rows in tables:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(name)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre></body></html>\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Text that Markdown and the HTML inside it leave alone."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
