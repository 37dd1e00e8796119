"""Articles in JATS XML: their figures, captions as plain text, licence, and where each figure is cited.

The XML is foreign. Entities can only be declared before the first element, so that part goes through defusedxml, which
refuses them; then the whole file goes through the parser of the standard library, which loads no DTD, opens no address
and knows no XInclude.
"""

from __future__ import annotations

import html.entities
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from medclip_hf.data.articles.jats_text import MATHML, XLINK_HREF, all_text, caption_text

MAX_XML_BYTES = 48 * 2**20  # the tree takes about ten times as much memory
MAX_FIGURES = 2000
MAX_SHARED_CHARS = 20_000  # of the captions of its groups, which each figure repeats
_MAX_GROUPS = 4  # around a figure, the innermost ones
_PROLOG_CHUNK = 4096

_CC_CODE = re.compile(r"(?:creativecommons\.org/licen[sc]es/|\bCC[ -]?)BY((?:[ /-]?(?:NC|ND|SA))*)(?![a-z])", re.I)
_CC_ZERO = re.compile(r"creativecommons\.org/publicdomain/zero|\bCC[ -]?(?:0|zero)\b|creative commons zero", re.I)
_PUBLIC_DOMAIN = re.compile(r"creativecommons\.org/publicdomain/mark", re.I)
_CREATIVE_COMMONS = re.compile(r"creative ?commons", re.I)
_TERMS_IN_WORDS = {  # English, French, Spanish, Portuguese, German
    "NC": re.compile(r"n[oã]n?[ -]?com+ercial|utilisation commerciale|nicht[ -]?kommerziell", re.I),
    "ND": re.compile(r"no[ -]?deriv|sin ?(?:obras? )?deriv|sem deriv|pas de modification|keine bearbeitung", re.I),
    "SA": re.compile(r"share[ -]?alike|compartir ?igual|partilha|dans les mêmes conditions|gleichen bedingungen", re.I),
}
_HYPHENS = re.compile("[\u2010-\u2015\u2212]")
OTHER_LICENSE = "other"  # a statement that names none of the Creative Commons
_RETRACTION_TYPES = {"retraction", "retracted-article", "partial-retraction"}
_RETRACTION_LINKS = {"retraction-forward", "partial-retraction-forward", "retracted-by"}
_RETRACTION_TITLE = re.compile(
    r"\W*(?:(?:retracted|withdrawn)\b\W|retraction\s*:|retraction not(?:e|ice)|(?:notice|statement) of retraction)",
    re.I,
)
_RETRACTION_SUBJECT = re.compile(r"\W*(?:retraction|retracted article|retraction not(?:e|ice))s?\W*", re.I)
_PARTS = ("front", "body", "back", "floats-group", "floats-wrap")  # not sub-article and response: other texts
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_RASTER_FIRST = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", "")


class UnreadableArticle(ValueError):
    """An article that cannot be used, or is not wanted.

    Args:
        reason: short and countable, fit for `data.stages.Drop`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[UnreadableArticle], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class ArticleFigure:
    """A figure of an article.

    Args:
        figure_id: unique in the article; its XML id where it has one that no other figure has.
        label: as printed (``"Figure 2"``); may be empty.
        caption: plain text on one line; that of a group of figures stands before that of its member.
        graphics: names of the picture files as the article writes them, often without a suffix; of several formats of
            one picture, one.
        cited_in: titles of the outermost sections that cite it, in their order.
        license: of this figure, where it differs from that of the article; "" otherwise.
    """

    figure_id: str
    label: str
    caption: str
    graphics: tuple[str, ...]
    cited_in: tuple[str, ...] = ()
    license: str = ""


@dataclass(frozen=True)
class Article:
    """What the engine wants to know of an article.

    Args:
        pmcid: with its letters, ``"PMC13901"``.
        pmid: digits; "" where it has none.
        license: ``"CC BY"``, ``"CC BY-NC-ND"``, ``"CC0"``, …; ``"other"``; "" where it states none.
        is_retracted: whether it was retracted, or is the notice of a retraction.
        figures: in the order of the text.
        file_names: all file names that it mentions, those of formulae, tables and supplements among them.
    """

    pmcid: str
    pmid: str
    license: str
    is_retracted: bool
    figures: tuple[ArticleFigure, ...]
    file_names: frozenset[str] = frozenset()


def parse_article(xml: bytes, *, pmcid: str = "") -> Article:
    """The article that a JATS file holds.

    Args:
        xml: the file.
        pmcid: for articles that do not say theirs.

    Raises:
        UnreadableArticle: where it is broken, declares entities, is too large, nested too deeply, or no article.
    """
    article = _find_article(_parse(xml))
    try:
        meta = article.find("./front/article-meta")
        meta = ElementTree.Element("article-meta") if meta is None else meta
        return Article(
            pmcid=_pmcid(meta) or pmcid,
            pmid=_first_id(meta, "pmid"),
            license=_license(meta.find("permissions")),
            is_retracted=_is_retracted(article, meta),
            figures=tuple(_figures(article)),
            file_names=_file_names(article),
        )
    except RecursionError as error:
        raise UnreadableArticle("XML nested too deeply", "elements inside elements beyond any use of JATS") from error


# --- XML ----------------------------------------------------------------------------------------------------------


class _RootReached(Exception):
    """No error: the prolog ends here."""


class _Prolog:
    """A target that stops the parser at the first element."""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        raise _RootReached


def _parse(xml: bytes) -> ElementTree.Element:
    if len(xml) > MAX_XML_BYTES:
        raise UnreadableArticle("XML too large", f"{len(xml):,} bytes, at most {MAX_XML_BYTES:,}")
    if not xml.strip(b"\0 \t\r\n"):
        raise UnreadableArticle("XML empty", f"{len(xml)} bytes")
    try:
        xml = xml.lstrip(b" \t\r\n")  # which no declaration may follow, and often does
        _refuse_entities(xml)
        parser = ElementTree.XMLParser()  # noqa: S314 - its prolog has been checked
        parser.entity.update(_NAMED_CHARACTERS)
        parser.feed(xml)
        return parser.close()
    except DefusedXmlException as error:
        raise UnreadableArticle("XML declares entities", str(error)[:200]) from error
    except ElementTree.ParseError as error:
        raise UnreadableArticle("XML broken", f"{error}{_encoding_remark(xml)}") from error
    except (LookupError, ValueError) as error:  # an encoding that Python does not know, or of several bytes
        raise UnreadableArticle("XML encoding unknown", str(error)) from error


def _refuse_entities(xml: bytes) -> None:
    parser = DefusedXMLParser(target=_Prolog())
    try:
        for start in range(0, len(xml), _PROLOG_CHUNK):
            parser.feed(xml[start : start + _PROLOG_CHUNK])
    except _RootReached:
        return


def _encoding_remark(xml: bytes) -> str:
    if xml[:2] in (b"\xff\xfe", b"\xfe\xff") or re.match(rb"<\?xml[^>]*encoding=[\"'](?!utf-8)", xml, re.I):
        return ""
    try:
        xml.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"; it is not UTF-8: {error.reason} at byte {error.start:,}"
    return ""


# Articles written against a DTD use its named characters (&alpha;, &nbsp;) without declaring them.
_NAMED_CHARACTERS = {name[:-1]: text for name, text in html.entities.html5.items() if name.endswith(";")}


def _find_article(root: ElementTree.Element) -> ElementTree.Element:
    if any(element.tag.endswith("}article") for element in (root, *root)):
        _drop_namespace(root)
    article = root if root.tag == "article" else next(root.iter("article"), None)
    if article is None:
        _drop_namespace(root)  # an envelope of another name space around it
        article = root if root.tag == "article" else next(root.iter("article"), None)
    if article is None:
        raise UnreadableArticle("XML is no article", f"its root is <{root.tag[:100]}>")
    if sum(1 for _ in root.iter("article")) > 1:
        raise UnreadableArticle("XML holds several articles", "split it into one file an article")
    return article


def _drop_namespace(root: ElementTree.Element) -> None:
    for element in root.iter():
        if element.tag.startswith("{") and not element.tag.startswith(MATHML):
            element.tag = element.tag.rpartition("}")[2]


# --- the article ----------------------------------------------------------------------------------------------------


def _first_id(meta: ElementTree.Element, kind: str) -> str:
    found = (all_text(node) for node in meta.findall("article-id") if node.get("pub-id-type") == kind)
    return next((text for text in found if text), "")


def _pmcid(meta: ElementTree.Element) -> str:
    """Written as ``PMC13901`` with the type ``pmcid`` today, as ``13901`` with the type ``pmc`` before."""
    number = _first_id(meta, "pmcid") or _first_id(meta, "pmc")
    digits = number.upper().removeprefix("PMC")
    return f"PMC{digits}" if digits.isdecimal() else ""


def _license(permissions: ElementTree.Element | None) -> str:
    """The licence in the spelling of PMC; where a statement names several, the restrictions of all of them."""
    if permissions is None:
        return ""
    addresses = [node.get(XLINK_HREF, "") for node in permissions.iter()]
    kinds = [node.get("license-type", "") for node in permissions.iter("license")]
    statement = all_text(permissions)
    text = _HYPHENS.sub("-", " ".join(" ".join((statement, *addresses, *kinds)).split()))
    if codes := _CC_CODE.findall(text):
        return _cc_by({term for term in _TERMS_IN_WORDS for code in codes if term in code.upper()})
    if _CREATIVE_COMMONS.search(text) and "attribution" in text.lower():
        return _cc_by({term for term, words in _TERMS_IN_WORDS.items() if words.search(text)})
    if _CC_ZERO.search(text):
        return "CC0"
    if _PUBLIC_DOMAIN.search(text):
        return "public domain"
    return OTHER_LICENSE if statement or any(addresses) else ""


def _cc_by(terms: set[str]) -> str:
    if "ND" in terms:  # what may not be changed cannot be shared alike
        terms -= {"SA"}
    return "-".join(("CC BY", *(term for term in _TERMS_IN_WORDS if term in terms)))


def _is_retracted(article: ElementTree.Element, meta: ElementTree.Element) -> bool:
    links = {node.get("related-article-type", "").lower() for node in meta.iter("related-article")}
    title = meta.find("./title-group/article-title")
    return (
        article.get("article-type", "").lower() in _RETRACTION_TYPES
        or bool(links & _RETRACTION_LINKS)
        or (title is not None and bool(_RETRACTION_TITLE.match(all_text(title))))
        or any(_RETRACTION_SUBJECT.fullmatch(all_text(subject)) for subject in meta.iter("subject"))
    )


# --- figures --------------------------------------------------------------------------------------------------------


def _figures(article: ElementTree.Element) -> Iterator[ArticleFigure]:
    cited_in = _citations(article)
    caption_of: dict[ElementTree.Element, str] = {}  # of groups, read once for all of their figures
    used: set[str] = set()
    for figure, groups in _figures_with_groups(article):
        if len(used) >= MAX_FIGURES:
            raise UnreadableArticle("article with too many figures", f"more than {MAX_FIGURES:,}")
        for group in groups:
            caption_of[group] = caption_of[group] if group in caption_of else _caption(group)[:MAX_SHARED_CHARS]
        shared = " ".join(filter(None, (caption_of[group] for group in groups)))[:MAX_SHARED_CHARS]
        xml_id = figure.get("id", "").strip()
        cited_ids = (xml_id, *(group.get("id", "") for group in reversed(groups)))
        yield ArticleFigure(
            figure_id=_unused(xml_id or f"fig{len(used) + 1}", used),
            label=next(filter(None, map(_label, (figure, *reversed(groups)))), ""),
            caption=" ".join(filter(None, (shared, _caption(figure)))),
            graphics=tuple(_graphics(figure)),
            cited_in=tuple(dict.fromkeys(title for cited in cited_ids for title in cited_in.get(cited, ()))),
            license=_license(figure.find("permissions")),
        )


def _figures_with_groups(
    article: ElementTree.Element,
) -> Iterator[tuple[ElementTree.Element, tuple[ElementTree.Element, ...]]]:
    """Each figure in the order of the text, with the groups around it, the outermost first."""
    waiting: list[tuple[ElementTree.Element, tuple[ElementTree.Element, ...]]]
    waiting = [(part, ()) for part in reversed(article) if part.tag in _PARTS]
    while waiting:
        element, groups = waiting.pop()
        if element.tag == "fig":
            yield element, groups
        elif element.tag == "fig-group":
            groups = (*groups, element)[-_MAX_GROUPS:]
        waiting += [(child, groups) for child in reversed(element)]


def _unused(name: str, used: set[str]) -> str:
    unique, number = name, 1
    while unique in used:
        number += 1
        unique = f"{name}-{number}"
    used.add(unique)
    return unique


def _label(figure: ElementTree.Element) -> str:
    label = figure.find("label")
    return "" if label is None else all_text(label)


def _caption(figure: ElementTree.Element) -> str:
    """The caption; of translated ones, or translated paragraphs of one, the English, else the first."""
    captions = figure.findall("caption") or figure.findall("./graphic/caption")
    if not captions:
        return ""
    chosen = next(filter(_is_english, captions), captions[0])
    if any(map(_is_english, chosen)):
        english = ElementTree.Element("caption")
        english.extend(child for child in chosen if _is_english(child) or not child.get(_LANGUAGE))
        chosen = english
    return caption_text(chosen)


def _is_english(element: ElementTree.Element) -> bool:
    return element.get(_LANGUAGE, "").lower().startswith("en")


def _graphics(figure: ElementTree.Element) -> Iterator[str]:
    """One file name a picture, pictures inside the caption left out."""
    for child in figure:
        if child.tag == "graphic":
            names = [child.get(XLINK_HREF, "")]
        elif child.tag == "alternatives":
            names = [graphic.get(XLINK_HREF, "") for graphic in sorted(child.iter("graphic"), key=_version_rank)]
        elif child.tag in ("p", "disp-group", "graphic-group"):  # old articles put the picture into a paragraph
            yield from filter(None, (node.get(XLINK_HREF, "").strip() for node in child.iter("graphic")))
            continue
        else:
            continue
        yield from [name.strip() for name in names if name.strip()][:1]


def _version_rank(graphic: ElementTree.Element) -> tuple[bool, int]:
    """Photographs before drawings, which cannot be decoded; thumbnails last."""
    suffix = re.search(r"\.\w{3,4}$|$", graphic.get(XLINK_HREF, "").strip().lower())
    suffix_text = suffix[0] if suffix else ""
    rank = _RASTER_FIRST.index(suffix_text) if suffix_text in _RASTER_FIRST else len(_RASTER_FIRST)
    return "thumb" in graphic.get("specific-use", "").lower(), rank


def _file_names(article: ElementTree.Element) -> frozenset[str]:
    tags = ("graphic", "inline-graphic", "media", "inline-supplementary-material", "supplementary-material", "self-uri")
    names = (node.get(XLINK_HREF, "").strip() for tag in tags for node in article.iter(tag))
    return frozenset(filter(None, names))


def _citations(article: ElementTree.Element) -> dict[str, tuple[str, ...]]:
    """Titles of the outermost sections that cite each XML id."""
    found: dict[str, dict[str, None]] = {}
    for title, section in _outer_sections(article):
        for reference in section.iter("xref"):
            for xml_id in reference.get("rid", "").split():
                found.setdefault(xml_id, {})[title] = None
    return {xml_id: tuple(titles) for xml_id, titles in found.items()}


def _outer_sections(article: ElementTree.Element) -> Iterator[tuple[str, ElementTree.Element]]:
    for abstract in article.findall("./front/article-meta/abstract"):
        yield "Abstract", abstract
    for part in (*article.findall("body"), *article.findall("back"), *article.findall("./back/app-group")):
        for section in part:
            if section.tag in ("sec", "app"):
                title = section.find("title")
                name = "" if title is None else all_text(title)
                yield name or section.get("sec-type", ""), section
