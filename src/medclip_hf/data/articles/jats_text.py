"""The text of JATS elements on one line: blocks apart, words whole, formulae readable, marks of footnotes left out."""

from __future__ import annotations

import re
import unicodedata
from xml.etree.ElementTree import Element

XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
MATHML = "{http://www.w3.org/1998/Math/MathML}"

_BLOCKS = frozenset(
    {
        *("p", "title", "subtitle", "sec", "list", "list-item", "def-list", "def-item", "term", "def", "disp-quote"),
        *("disp-formula", "disp-formula-group", "break", "table", "tr", "td", "th", "label", "caption", "fn", "array"),
        *("speech", "statement", "verse-group", "verse-line", "boxed-text", "fig", "graphic", "media", "attrib"),
        *("license-p", "license", "copyright-statement", "copyright-holder", "copyright-year", "license_ref"),
    }
)
_UNSAID = frozenset(  # no part of the caption as a reader sees it
    {
        *("graphic", "inline-graphic", "media", "inline-media", "alt-text", "long-desc", "object-id", "permissions"),
        *("supplementary-material", "inline-supplementary-material", "private-char", "processing-meta", "index-term"),
    }
)
_FORMULAE = frozenset({"inline-formula", "disp-formula", "chem-struct"})
_NOTE_MARKS = frozenset({"fn", "table-fn", "corresp", "aff"})
_CITATION_NUMBERS = re.compile(r"[\s\d,;–—\[\]()-]*")
_EMPTY_BRACKETS = re.compile(r"\s?(?:\[[\s,;–—-]*\]|\([\s,;–—-]*\))")
_LEFT_OUT = "\0"  # stands for a reference until the line is whole; XML cannot hold it
_SEVERAL_LEFT_OUT = re.compile(r"\0(?:[\s,;–—-]*\0)+")
_BRACKETED_LEFT_OUT = re.compile(r"\s?[\[(]\s?\0\s?[\])]")
_LEFT_OUT_AT_END = re.compile(r"[\s,;]{0,3}\0(?=\s?[\])])|\s?\0(?=[.,;:])|(?<=[\[(])\0[\s,;]{0,3}")
_LEFT_OUT_IN_WORDS = re.compile(r"(?<=\w)\0(?=\w)")
_SENTENCE_END = (".", "?", "!", ":", ";", ",")
_CLOSING = (")", "]", *_SENTENCE_END)
_LONE_LETTER = re.compile(r"[A-Za-z]")
_CLOSED_LETTER = re.compile(r"[).,:;]{1,3}(?=[A-Z][a-z])")  # behind it: "(<bold>A</bold>)Axial"
_ORDINALS = ("st", "nd", "rd", "th")
_LINKS = frozenset({"xref", "ext-link", "uri", "email"})

MAX_TEX_CHARS = 20_000  # with the preamble that some publishers repeat in every formula
_DOCUMENT = re.compile(r"\\begin\{document\}(.*?)\\end\{document\}", re.S)
_TEX_COMMAND = re.compile(r"\\([A-Za-z]+)")
_TEX_SIGNS = {
    "times": "×", "pm": "±", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "neq": "≠", "approx": "≈", "sim": "~",
    "cdot": "·", "rightarrow": "→", "to": "→", "infty": "∞", "degree": "°", "circ": "°", "sum": "∑", "mu": "µ",
}  # fmt: skip
_TEX_LAYOUT = {
    *("text", "textrm", "mathrm", "mathit", "mathbf", "textbf", "textit", "rm", "bf", "it", "left", "right", "big"),
    *("displaystyle", "textstyle", "mathbb", "mathcal", "operatorname", "hbox", "mbox", "quad", "qquad", "limits"),
}


def all_text(element: Element) -> str:
    """All text below an element on one line, blocks apart."""
    return _one_line(_pieces(element, is_caption=False))


def caption_text(caption: Element) -> str:
    """A caption as one line of plain text.

    Titles that end without a mark get a full stop. Numbers that cite the literature and marks of footnotes are left
    out, names that cite it stay; formulae are written in a line; ``10<sup>6</sup>`` becomes ``10^6``.
    """
    return _EMPTY_BRACKETS.sub("", _close_gaps(_one_line(_pieces(caption, is_caption=True))))


def _close_gaps(line: str) -> str:
    """A line without the places of what was left out, nor the brackets and commas that were around it."""
    if _LEFT_OUT not in line:
        return line
    line = _BRACKETED_LEFT_OUT.sub(_LEFT_OUT, _SEVERAL_LEFT_OUT.sub(_LEFT_OUT, line))
    line = _LEFT_OUT_IN_WORDS.sub(" ", _LEFT_OUT_AT_END.sub("", line))
    return " ".join(line.replace(_LEFT_OUT, "").split())


def _one_line(pieces: list[str]) -> str:
    text = "".join(pieces).replace("\u00ad", "").replace("\u200b", "")
    return " ".join(text.split())


def _pieces(element: Element, is_caption: bool) -> list[str]:
    """Texts of an element and what is inside, without its tail."""
    pieces = [element.text] if element.text else []
    for child in element:
        tag = child.tag
        if tag in _UNSAID and is_caption:
            inside: list[str] = []
        elif tag in _FORMULAE or tag == f"{MATHML}math" or tag == "tex-math":
            inside = [text] if (text := formula_text(child)) else []
        elif tag == "alternatives":
            inside = _first_with_text(child, is_caption)
        elif is_caption and tag == "xref" and _is_mark(child):
            inside = [_LEFT_OUT]
        else:
            inside = _pieces(child, is_caption)
        if tag == "title" and is_caption:
            inside = [_ended("".join(inside))]
        elif tag == "sup":
            inside = _raised(pieces[-1] if pieces else "", "".join(inside))
        inside = [piece for piece in inside if piece]
        if tag in _BLOCKS or _is_glued("".join(pieces[-2:]), child, inside):
            pieces.append(" ")
        pieces += [*inside, " "] if tag in _BLOCKS else inside
        pieces += _tail(child, inside)
    return pieces


def _first_with_text(alternatives: Element, is_caption: bool) -> list[str]:
    """The pieces of the first version of the same thing that is text."""
    versions = (_pieces(child, is_caption) for child in alternatives if child.tag not in _UNSAID)
    return next((pieces for pieces in versions if "".join(pieces).strip()), [])


def _is_mark(reference: Element) -> bool:
    kind = reference.get("ref-type", "")
    return kind in _NOTE_MARKS or (kind == "bibr" and bool(_CITATION_NUMBERS.fullmatch("".join(reference.itertext()))))


def _ended(title: str) -> str:
    title = title.rstrip(f" {_LEFT_OUT}")
    return title if not title or title.endswith(_SENTENCE_END) else f"{title}."


def _raised(before: str, raised: str) -> list[str]:
    """An exponent stays apart from a number before it, a letter from a word."""
    if before and raised.strip() and before[-1].isalnum():
        first = raised.strip()[0]
        is_ordinal = before[-1].isdigit() and raised.strip() in _ORDINALS
        if (before[-1].isdigit() and (first.isdigit() or first in "-−–+") and raised.strip() not in "-−–+") or (
            first.isalpha() and before[-1].isalpha() and not is_ordinal
        ):
            return ["^", raised]
    return [raised]


def _is_glued(before: str, child: Element, inside: list[str]) -> bool:
    """Whether type setting alone parts a child from the text before it: ``see<xref>Figure 2</xref>``."""
    first = inside[0][:1] if inside else ""
    if child.tag in _LINKS or child.tag in _FORMULAE:
        return len(before) > 1 and before[-2:].isalpha() and first.isalnum()
    is_closed = before[-1:] in _CLOSING and before[-2:-1].isalnum()
    return child.tag == "bold" and is_closed and (first.isupper() or first == "(")


def _tail(child: Element, inside: list[str]) -> list[str]:
    """The text after a child, apart where type setting alone parted it: ``<bold>(A)</bold>Axial``."""
    tail = child.tail or ""
    last = inside[-1] if inside else ""
    is_letter = child.tag in ("bold", "italic") and inside == [last] and bool(_LONE_LETTER.fullmatch(last))
    if is_letter and (closed := _CLOSED_LETTER.match(tail)):
        return [closed[0], " ", tail[closed.end() :]]
    if not tail[:1].isalpha() or child.tag in ("sub", "sup"):
        return [tail] if tail else []
    if child.tag in _LINKS or child.tag in _FORMULAE:
        # One letter is a panel or a plural: ``<xref>Fig. 2</xref>b``.
        is_apart = last[-1:].isalnum() and tail[1:2].isalpha() and not tail.startswith(_ORDINALS)
    else:
        is_apart = last[-1:] in _CLOSING or (is_letter and tail[0].isupper() and tail[1:2].islower())
    return [" ", tail] if is_apart else [tail]


# --- formulae ---------------------------------------------------------------------------------------------------------


def formula_text(formula: Element) -> str:
    """A formula in a line: from its MathML, else its LaTeX, else whatever text it has.

    ``<msup>`` becomes ``a^b``, ``<msub>`` ``a_b``, ``<mfrac>`` ``a/b``, ``<msqrt>`` ``√(a)``.
    """
    math = formula if formula.tag == f"{MATHML}math" else formula.find(f".//{MATHML}math")
    if math is not None and (text := " ".join(_mathml(math).split())):
        return text
    tex = formula if formula.tag == "tex-math" else formula.find(".//tex-math")
    if tex is not None and (text := _tex(tex.text or "")):
        return text
    return " ".join("".join(_pieces(formula, is_caption=True)).split())


def _mathml(element: Element) -> str:
    tag = element.tag.removeprefix(MATHML)
    if tag in ("mi", "mn", "mtext", "ms"):
        return (element.text or "").strip()
    if tag == "mo":
        sign = (element.text or "").strip()
        return f" {sign} " if sign and (sign in "=<>≤≥≈≠±×→∼~+" or sign.isalpha()) else sign
    if tag == "mspace":
        return " "
    if tag == "annotation" or tag == "annotation-xml":
        return ""
    parts = [_mathml(child) for child in element]
    if tag == "msup" and len(parts) == 2:
        return f"{parts[0]}^{_bracketed(parts[1])}"
    if tag == "msub" and len(parts) == 2:
        return f"{parts[0]}_{_bracketed(parts[1])}"
    if tag == "mfrac" and len(parts) == 2:
        return f"{_bracketed(parts[0])}/{_bracketed(parts[1])}"
    if tag in ("msubsup", "munderover") and len(parts) == 3:
        return f"{parts[0]}_{_bracketed(parts[1])}^{_bracketed(parts[2])}"
    if tag == "mfenced":
        inner = element.get("separators", ",")[:1].join(parts)
        return f"{element.get('open', '(')}{inner}{element.get('close', ')')}"
    if tag == "msqrt":
        return f"√({''.join(parts)})"
    return (" " if tag in ("mtr", "mtd") else "").join(parts)


def _bracketed(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 1 or text.isalnum() or text[1:].isdigit() else f"({text})"


def _tex(source: str) -> str:
    r"""LaTeX without its commands of layout: ``$$\alpha = 0.05$$`` gives ``α = 0.05``."""
    source = source[:MAX_TEX_CHARS]
    document = _DOCUMENT.search(source)
    text = document[1] if document else source
    text = re.sub(r"\\[,;:! ]", " ", text)
    text = re.sub(r"\\([%&#_$])", r"\1", re.sub(r"\$", "", text))
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = _TEX_COMMAND.sub(_tex_command, text)
    return " ".join(re.sub(r"[{}\\]", "", text).split())


def _tex_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _TEX_LAYOUT:
        return ""
    if name in _TEX_SIGNS:
        return _TEX_SIGNS[name]
    case = "CAPITAL" if name[:1].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {case} LETTER {name.upper()}")
    except KeyError:
        return name
