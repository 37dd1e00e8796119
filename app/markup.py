"""HTML that the tabs share: pictures without files, tables whose rows are buttons, messages. Everything is escaped."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.explain.overlay import COLOUR_MAP, encode_png

NOTICE = (
    "Not a medical device. For research only: nothing on this page may guide diagnosis or "
    "treatment. Upload nothing that tells who a patient is."
)
DEMO_NOTICE = (
    "The demo models learned from drawings alone. What they say of the examples shows how the page works; what they "
    "say of a real picture or scan means nothing."
)
# Rows and thumbnails are buttons, so the keyboard reaches them; the pressed one is marked without a new rendering,
# which would take the focus away.
ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-choice]');
  if (!button) return;
  element.querySelectorAll('[data-choice]').forEach((other) => other.setAttribute('aria-pressed', other === button));
  trigger('click', {choice: button.dataset.choice});
});
"""


@dataclass(frozen=True)
class Row:
    """A row of a table of scores.

    Args:
        choice: what a click on it sends.
        name: of the finding or concept.
        detail: small print below the name.
        scores: in [0, 1], one a column; None: not scored.
        note: in the last column.
    """

    choice: str
    name: str
    detail: str
    scores: Sequence[float | None]
    note: str = ""


def scroll_to(element: str) -> str:
    """JavaScript that shows an element where the page is one column and results lie far below the buttons."""
    return f"() => {{ if (innerWidth < 700) document.getElementById('{element}').scrollIntoView(); }}"


def picture(pixels: NDArray[np.uint8], alt: str, caption: str = "", *, extra: str = "") -> str:
    """A figure with its picture inside the page: no file is written, and nothing is fetched."""
    code = base64.b64encode(encode_png(pixels)).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="mc-figure"><div class="mc-picture"><img alt="{html.escape(alt, quote=True)}" '
        f'src="data:image/png;base64,{code}">{extra}</div>{below}</figure>'
    )


def placeholder(text: str) -> str:
    """An empty place and what will stand there."""
    return f'<div class="mc-empty">{html.escape(text)}</div>'


def error_message(text: str) -> str:
    """A sentence that a screen reader says at once."""
    return f'<p class="mc-error" role="alert">{html.escape(text)}</p>'


def status(text: str) -> str:
    """A sentence about what was done."""
    return f'<p class="mc-status" role="status">{html.escape(text)}</p>'


def score_table(
    columns: Sequence[str], rows: Sequence[Row], *, caption: str, pressed: str = "", note_title: str = ""
) -> str:
    """A table of scores with bars; each row's name is a button."""
    titles = "".join(
        f'<th scope="col">{html.escape(title)}</th>' for title in (*columns, *([note_title] * bool(note_title)))
    )
    body = "".join(_row(row, row.choice == pressed, bool(note_title)) for row in rows)
    looks = "mc-table" + " mc-noted" * bool(note_title) + " mc-many" * (len(columns) > 2)
    return (
        f'<div class="mc-scroll"><table class="{looks}"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def plain_table(columns: Sequence[str], rows: Iterable[tuple[str, float]], *, caption: str) -> str:
    """A table of scores that cannot be clicked."""
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in columns)
    body = "".join(f'<tr><th scope="row">{html.escape(name)}</th>{_score(score)}</tr>' for name, score in rows)
    return (
        f'<div class="mc-scroll"><table class="mc-table"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def thumbnails(pictures: Sequence[tuple[str, NDArray[np.uint8], str]], label: str) -> str:
    """Examples as buttons: (choice, pixels, name) of each."""
    buttons = "".join(
        f'<button type="button" class="mc-thumb" data-choice="{html.escape(choice, quote=True)}" aria-pressed="false">'
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode("ascii")}">'
        f"<span>{html.escape(name)}</span></button>"
        for choice, pixels, name in pictures
    )
    return f'<div class="mc-thumbs" role="group" aria-label="{html.escape(label, quote=True)}">{buttons}</div>'


def colour_bar(low: float, high: float, label: str) -> str:
    """What the colours of a map mean."""
    steps = matplotlib.colormaps[COLOUR_MAP](np.linspace(0.0, 1.0, 9))[:, :3]
    colours = ", ".join(matplotlib.colors.to_hex(colour) for colour in steps)
    return (
        f'<div class="mc-bar"><span>{low:.2f}</span><i style="background: linear-gradient(to right, {colours})"></i>'
        f"<span>{high:.2f}</span><em>{html.escape(label)}</em></div>"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Coloured swatches with names."""
    items = "".join(f'<li><i style="background: {colour}"></i>{html.escape(name)}</li>' for colour, name in entries)
    return f'<ul class="mc-legend">{items}</ul>'


def fitted(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """The picture with its longer side brought to `side` pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def _row(row: Row, is_pressed: bool, has_note: bool) -> str:
    note = f'<td class="mc-note">{html.escape(row.note)}</td>' if has_note else ""
    detail = f"<small>{html.escape(row.detail)}</small>" if row.detail else ""
    return (
        f'<tr><th scope="row"><button type="button" data-choice="{html.escape(row.choice, quote=True)}" '
        f'aria-pressed="{str(is_pressed).lower()}">{html.escape(row.name)}{detail}</button></th>'
        f"{''.join(_score(score) for score in row.scores)}{note}</tr>"
    )


def _score(score: float | None) -> str:
    if score is None:
        return '<td class="mc-score"><span class="mc-none">not scored</span></td>'
    return f'<td class="mc-score"><span>{score:.2f}</span><i style="--share: {min(max(score, 0.0), 1.0):.3f}"></i></td>'
