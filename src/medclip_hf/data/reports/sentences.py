"""Radiology prose as sentences, and what each of their clauses states or denies."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from medclip_hf.data.reports.lexicon import TermIndex, load_table

NOT_GIVEN = frozenset({"", "not given", "nan", "none", "n/a", "-", "--"})  # CT-RATE writes "Not given."

_LIST_MARK = re.compile(r"^\s*(?:\(?\d{1,2}[.)](?=\s|[A-Za-z])|[-–—•*·>]+(?=\s|[A-Z])|\([a-z]\)\s)\s*")
_INLINE_NUMBER = re.compile(r"(?<=[.;:!?])\s+(?=\(?\d{1,2}[.)]\s+[A-Z])|\s+(?=\(?\d{1,2}\)\s+[A-Z])")
_STOP = re.compile(r"[.!?]+")
_LAST_WORD = re.compile(r"[^\s(\[\"']+$")
_HEADING = re.compile(r"^([A-Z][A-Za-z][A-Za-z ,/&()-]{0,60}?):(?=\s|$)")

_VERB = r"(?:is|are|was|were|has|have|had|shows?|appears?|measures?|contains?|demonstrates?|remains?|reach(?:es)?)"
_HAS_VERB = re.compile(rf"\b{_VERB}\b")
_DETECTED = re.compile(
    rf"\b{_VERB}\s+(?:not\s+)?(?:been\s+)?"
    r"(?:seen|observed|detected|identified|noted|found|present|visible|evident|demonstrated|selected)\b"
)
_DENIAL = re.compile(r"\s*(?:there (?:is|are|was|were) )?(?:no|without|neither)\b")
_BREAK = re.compile(
    r"\s*;\s*|,?\s+\b(?:but|however|while|whereas|although|though|except|yet|apart from)\b\s*"
    r"|,?\s+and\s+(?=(?:an?|the|there)\s)|,\s*(?=(?:there|an?|with|mild|minimal|small|large|moderate|marked)\s)"
)
_JOINT = re.compile(r",?\s+and\s+|,\s+")


@dataclass(frozen=True)
class Clause:
    """A part of a sentence that states one thing.

    Args:
        text: lower-cased.
        has_abnormal: it names something abnormal without denying it.
        is_denial: it denies something, or calls it normal, and states nothing abnormal.
    """

    text: str
    has_abnormal: bool
    is_denial: bool


def clean_section(text: str) -> str:
    """The section without outer white space; empty where the source says that it was not given."""
    stripped = text.strip()
    return "" if stripped.lower().rstrip(".").strip() in NOT_GIVEN else stripped


def split_sentences(text: str) -> list[str]:
    """Sentences of a section in their order, white space made single, marks of lists left out.

    Line breaks end a sentence only where the next line begins a new one (a list mark or a capital after a full stop or
    colon, or a blank line); a full stop does so unless it stands in a number, after an abbreviation or an initial.
    """
    sentences: list[str] = []
    for line in _logical_lines(text):
        for item in _INLINE_NUMBER.split(line):
            sentences.extend(_split_at_stops(_LIST_MARK.sub("", item)))
    return [sentence for sentence in sentences if any(letter.isalnum() for letter in sentence)]


def heading_of(sentence: str) -> str | None:
    """The heading that a sentence begins with ("Lungs and pleura" of "Lungs and pleura: Clear."), else None."""
    found = _HEADING.match(sentence)
    return found.group(1) if found else None


def split_clauses(sentence: str) -> list[Clause]:
    """Clauses of a sentence, each judged for itself: "no effusion, but the heart is enlarged" denies and states.

    The judgement follows NegEx: cues before and after a term, cues that only look like a negation; its scope ends with
    the clause. Source of the idea: Chapman et al. 2001, A simple algorithm for identifying negated findings.
    """
    clauses = []
    for text in _clause_texts(sentence.lower()):
        abnormal, denies = _judge(text)
        clauses.append(Clause(text, abnormal, denies and not abnormal))
    return clauses


def _logical_lines(text: str) -> Iterator[str]:
    """Lines with wrapped ones joined."""
    current = ""
    for raw in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = " ".join(raw.split())
        is_wrapped = bool(line) and bool(current) and not _LIST_MARK.match(line) and not _HEADING.match(line)
        if is_wrapped and not (line[0].isupper() and current[-1] in ".:!?") and not _begins_anew(current, line):
            current = f"{current} {line}"
            continue
        if current:
            yield current
        current = line
    if current:
        yield current


def _begins_anew(current: str, line: str) -> bool:
    """Whether a line that follows one without a full stop begins a sentence: capitalised, and no acronym."""
    words = line.split()
    is_short = len(current) <= 100 and current[-1] not in ",-("
    return is_short and words[0][0].isupper() and not words[0].isupper() and len(words) > 1


def _split_at_stops(text: str) -> Iterator[str]:
    start = 0
    for stop in _STOP.finditer(text):
        if _ends_sentence(text, stop.start(), stop.end()):
            yield text[start : stop.end()].strip()
            start = stop.end()
    if text[start:].strip():
        yield text[start:].strip()


def _ends_sentence(text: str, stop: int, after: int) -> bool:
    if after >= len(text) or text[stop] in "!?":
        return True
    if not text[after].isspace():  # "normal.Mediastinal" lacks its space; "1.5", "e.g." and "T.B" do not
        return text[after].isupper() and (stop >= 2 and text[stop - 1].islower() and text[stop - 2].isalpha())
    found = _LAST_WORD.search(text, max(0, stop - 24), stop)
    word = found.group().lower() if found else ""
    following = text[after : after + 24].lstrip()[:1]  # white space is single here
    if word in _abbreviations():
        # "no." and "post." are also words: they end a sentence before a capital, and number or shorten before others.
        return False if word not in {"no", "post", "min", "max"} else following.isupper()
    return not (len(word) == 1 and word.isalpha() and following.isupper())


def _clause_texts(sentence: str) -> Iterator[str]:
    start = 0
    for found in _BREAK.finditer(sentence):
        yield from _split_at_joints(sentence[start : found.start()])
        start = found.end()
    yield from _split_at_joints(sentence[start:])


def _split_at_joints(text: str) -> Iterator[str]:
    """Cut at "and" or a comma where both sides could stand alone, which the items of a list cannot."""
    joints = [(found.start(), found.end()) for found in _JOINT.finditer(text)]
    last_detected = max((found.start() for found in _DETECTED.finditer(text)), default=-1)
    begin, piece_start, has_verb = 0, 0, False
    for i, (left_end, right_start) in enumerate(joints):
        has_verb = has_verb or bool(_HAS_VERB.search(text, piece_start, left_end))
        right_end = joints[i + 1][0] if i + 1 < len(joints) else len(text)
        stands_alone = has_verb or (bool(_DENIAL.match(text, begin)) and last_detected < right_start)
        piece_start = right_start
        if stands_alone and (_HAS_VERB.search(text, right_start, right_end) or _DENIAL.match(text, right_start)):
            yield text[begin:left_end]
            begin, has_verb = right_start, False
    if text[begin:].strip():
        yield text[begin:]


@lru_cache(maxsize=1)
def _cues() -> dict[str, TermIndex]:
    table = load_table("statements.json")
    return {
        name: TermIndex(dict.fromkeys(terms, ()))
        for name, terms in table.items()
        if name not in ("about", "abbreviations")
    }


@lru_cache(maxsize=1)
def _abbreviations() -> frozenset[str]:
    return frozenset(load_table("statements.json")["abbreviations"])


def _judge(clause: str) -> tuple[bool, bool]:
    """(names something abnormal that is not denied, denies something or calls it normal)."""
    cues = _cues()
    letters = list(clause)
    for found in cues["negation_apparent"].find(clause):
        letters[found.start : found.end] = " " * (found.end - found.start)
    visible = "".join(letters)
    after = list(cues["negation_after"].find(visible))
    last_denied = max((found.start for found in after), default=-1)
    backward = {found.start for found in after}  # their own "not" does not reach forward
    before = [found.end for found in cues["negation_before"].find(visible) if found.start not in backward]
    first_denied = min(before, default=len(visible) + 1)
    abnormal = any(last_denied <= found.start < first_denied for found in cues["abnormal"].find(visible))
    return abnormal, bool(before or after) or any(True for _ in cues["normal"].find(visible))
