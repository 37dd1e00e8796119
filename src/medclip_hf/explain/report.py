"""A report in one HTML file: text, tables and pictures inlined, nothing fetched, nothing executed."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOTICE = (
    "For research only. This is not a medical device: neither the model nor this page may guide diagnosis or treatment."
)
# The page may not load or run anything, even if text in it tried to.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MEDIA_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_STYLE = """
:root { color-scheme: light dark; --line: #9996; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.notice { border-left: .3rem solid #c62828; background: #c6282818; padding: .6rem .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: right; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); vertical-align: bottom; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
figcaption { font-size: .9rem; opacity: .85; }
"""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first column names the row.

    Args:
        header: names of the columns.
        rows: as many cells as the header in each.
        caption: what the table shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def as_text(self) -> str:
        """The table for a terminal, without its caption."""
        lines = [list(self.header), *(list(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in padded)


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with a caption.

    Args:
        content: the encoded file.
        caption: below the picture.
        alternative: said to who cannot see it; default: the caption.
    """

    content: bytes
    caption: str
    alternative: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    parts: Sequence[Paragraph | Table | Picture]


def render_report(title: str, sections: Sequence[Section], *, notice: str = NOTICE, language: str = "en") -> str:
    """The HTML of a report; every text is escaped, every picture becomes a data URI.

    Args:
        title: of the page.
        sections: in reading order.
        notice: stands first; the report of a medical model must say what it is not.
        language: code of the text's language.

    Raises:
        ValueError: an empty title or notice, a table row of another length than its header, bytes that are no PNG or
            JPEG.
    """
    if not title.strip() or not notice.strip():
        raise ValueError("a report needs a title and a notice that it is not a medical device")
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="{_text(language)}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_text(_POLICY)}">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="notice" role="note">{_text(notice)}</p>
{body}
</body>
</html>
"""


def write_report(path: str | Path, title: str, sections: Sequence[Section], *, notice: str = NOTICE) -> Path:
    """Path of the report written, whole or not at all; arguments and errors as in `render_report`."""
    target = Path(path)
    page = render_report(title, sections, notice=notice)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def _section(section: Section) -> str:
    return "\n".join(["<section>", f"<h2>{_text(section.heading)}</h2>", *map(_part, section.parts), "</section>"])


def _part(part: Paragraph | Table | Picture) -> str:
    if isinstance(part, Paragraph):
        return f"<p>{_text(part.text)}</p>"
    return _table(part) if isinstance(part, Table) else _picture(part)


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"the table has {len(table.header)} columns {list(table.header)}, but a row {list(row)}")
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = [
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    ]
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    media_type = next((kind for magic, kind in _MEDIA_TYPES.items() if picture.content.startswith(magic)), None)
    if media_type is None:
        raise ValueError(f"the picture {picture.caption!r} is neither PNG nor JPEG")
    data = base64.b64encode(picture.content).decode("ascii")
    alternative = _text(picture.alternative or picture.caption)
    return (
        f'<figure><img alt="{alternative}" src="data:{media_type};base64,{data}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
