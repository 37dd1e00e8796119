"""Radiology reports decomposed by rules: what findings and impression say of each anatomy, and whether it is normal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medclip_hf.data.records import AnatomyText
from medclip_hf.data.reports.lexicon import (
    canonical_anatomy,
    find_mentions,
    function_words,
    mentioned_anatomies,
    unique,
)
from medclip_hf.data.reports.sentences import clean_section, heading_of, split_clauses, split_sentences
from medclip_hf.data.stages import Drop

NORMAL_RULES = ("impression", "findings_too")

# Words that carry on with the subject of the sentence before.
_CONTINUES = re.compile(
    r"^(?:it|its|they|their|theirs|these|this|those|that|which|both of (?:them|these)|some of (?:them|these)"
    r"|one of (?:them|these)|most of (?:them|these)|the (?:largest|biggest|smallest|latter|former|others?|same)"
    r"|the (?:described|mentioned|aforementioned|said)|the lesions?|the mass|measuring|similar(?:ly)?"
    r"|within (?:it|them)|in addition to (?:it|them|these)|accompanying)\b",
    re.IGNORECASE,
)
_REFERS = re.compile(r"\b(?:within|in|around|of|inside|beside|to|near) (?:it|them|these|this|which)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """A sentence of a section with the anatomies it speaks of.

    Args:
        sentence: as written, without list marks.
        anatomies: all of the lexicon's, whether asked for or not; empty where the sentence is not assigned.
        abnormal_in: those in which it states something abnormal.
        normal_in: those of which it only denies something or says that they are normal.
        assigned_by: "terms", "subject" (of the sentence before), "heading", "weak terms" or "" where not assigned.
    """

    sentence: str
    anatomies: tuple[str, ...]
    abnormal_in: tuple[str, ...]
    normal_in: tuple[str, ...]
    assigned_by: str


def decompose_report(
    findings: str, impression: str, anatomies: Sequence[str], *, normal_rule: str = "impression"
) -> tuple[AnatomyText, ...]:
    """What a report says of each anatomy, in the order of `anatomies`.

    A sentence that names several anatomies goes to each; one that carries on ("It measures ...") follows the sentence
    before it; one under a heading ("Lungs: ...") that names nothing itself follows the heading.

    Args:
        findings: the section's text; empty or "Not given." where there is none.
        impression: likewise.
        anatomies: names of the lexicon or other usual ones; the result bears them as given.
        normal_rule: "impression": an anatomy is abnormal where the impression mentions it, as published; findings that
            the impression is silent on count as normal then. "findings_too": it is abnormal where either section states
            something abnormal of it, or the impression mentions it without calling it normal; denials are understood.

    Raises:
        ValueError: on a text that is no string, an anatomy without words in the lexicon, or an unknown rule.
    """
    for name, text in (("findings", findings), ("impression", impression)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string ('' where there is none), got {type(text).__name__}.")
    return assemble_texts(read_statements(findings), read_statements(impression), anatomies, normal_rule=normal_rule)


def decompose_reports(
    reports: Sequence[tuple[str, str]], anatomies: Sequence[str], *, normal_rule: str = "impression"
) -> list[tuple[list[Statement], tuple[AnatomyText, ...]]]:
    """For each report (findings, impression) the statements of both sections and the texts; see `decompose_report`."""
    results = []
    for report in reports:
        findings, impression = (read_statements(section) for section in report)
        texts = assemble_texts(findings, impression, anatomies, normal_rule=normal_rule)
        results.append(([*findings, *impression], texts))
    return results


def assemble_texts(
    findings: Sequence[Statement],
    impression: Sequence[Statement],
    anatomies: Sequence[str],
    *,
    normal_rule: str = "impression",
) -> tuple[AnatomyText, ...]:
    """Texts of each anatomy from the statements of the two sections; see `decompose_report`."""
    if normal_rule not in NORMAL_RULES:
        raise ValueError(f"normal_rule must be one of {NORMAL_RULES}, got {normal_rule!r}.")
    texts = []
    for anatomy in anatomies:
        name = canonical_anatomy(anatomy)
        told = [statement for statement in findings if name in statement.anatomies]
        concluded = [statement for statement in impression if name in statement.anatomies]
        if normal_rule == "impression":
            is_abnormal = bool(concluded)
        else:
            is_abnormal = any(name in s.abnormal_in for s in told) or any(name not in s.normal_in for s in concluded)
        texts.append(AnatomyText(anatomy, _join(told), _join(concluded), is_abnormal))
    return tuple(texts)


def read_statements(section: str) -> list[Statement]:
    """The sentences of a section in their order, each with the anatomies it speaks of."""
    statements: list[Statement] = []
    under_heading: tuple[str, ...] = ()
    for sentence in split_sentences(clean_section(section)):
        heading = heading_of(sentence)
        if heading is not None:
            under_heading = mentioned_anatomies(heading)
        before = statements[-1].anatomies if statements else ()
        anatomies, assigned_by = _assign(sentence, before, under_heading)
        statements.append(state(sentence, anatomies, assigned_by))
    return statements


def state(sentence: str, anatomies: tuple[str, ...], assigned_by: str) -> Statement:
    """The statement that a sentence makes of given anatomies: clause by clause abnormal, normal or neither."""
    abnormal: list[str] = []
    denied: list[str] = []
    spoken_of: tuple[str, ...] = ()
    clauses = split_clauses(sentence)
    named = [_named_in(clause.text, anatomies) for clause in clauses]
    for i, clause in enumerate(clauses):
        # A clause that names nothing speaks of what was named before it, or, at the beginning, of what comes next.
        spoken_of = named[i] or spoken_of or next((names for names in named[i:] if names), anatomies)
        if clause.has_abnormal:
            abnormal.extend(spoken_of)
        elif clause.is_denial:
            denied.extend(spoken_of)
    normal = [name for name in unique(denied) if name not in abnormal]
    return Statement(sentence, anatomies, unique(abnormal), tuple(normal), assigned_by)


def caption_template(anatomy: str) -> str:
    """The sentence that stands for an anatomy on which the impression is silent."""
    return f"{anatomy} shows no significant abnormalities."


def anatomy_caption(text: AnatomyText, style: str = "clean", keep_template: bool = False) -> str:
    """The text that the model encodes for an anatomy: impression, then findings; the template where both are silent.

    Assembly of the released code: the impression, or the template where it is silent, and the findings behind it, each
    with a full stop, without quotes, apostrophes and parentheses. Where findings follow the template it is taken away
    again before encoding, so that normal findings are read in their own words.

    Args:
        text: of one anatomy.
        style: "published": the parts are joined without a space and nothing else is changed. "clean": with a space.
        keep_template: give the text before the template is taken away: what the released code compares for equality.

    Raises:
        ValueError: on an unknown style.
    """
    if style not in ("published", "clean"):
        raise ValueError(f"style must be 'published' or 'clean', got {style!r}.")
    findings = _with_stop(text.findings)
    impression = _with_stop(text.impression)
    if not impression and (keep_template or not findings):
        impression = caption_template(text.anatomy)
    space = " " if style == "clean" and impression and findings else ""
    caption = f"{impression}{space}{findings}"
    return caption.translate({ord(letter): None for letter in "\"'()"})


def read_released_texts(
    findings_of: Mapping[str, str], impression_of: Mapping[str, str], anatomies: Sequence[str]
) -> tuple[AnatomyText, ...]:
    """Texts of a study from the decomposition released with fVLM: its entries of `desc_info.json` and `conc_info.json`.

    Args:
        findings_of: anatomy -> text, an anatomy missing where the section is silent; other keys are passed over.
        impression_of: likewise.
        anatomies: names as in the files ("lung", "heart", "esophagus", "aorta").
    """
    return tuple(
        AnatomyText(name, findings_of.get(name, ""), impression_of.get(name, ""), name in impression_of)
        for name in anatomies
    )


def check_report(findings: str, impression: str) -> Drop | None:
    """Why a report cannot be decomposed ("report empty", "report not in English"), or None where it can.

    The language is judged by function words: a report is set aside when the words of some other language outnumber the
    English ones, or when most of its letters are not Latin. Telegraphic reports without any function word pass.
    """
    text = f"{clean_section(findings)} {clean_section(impression)}".strip()
    if not any(letter.isalpha() for letter in text):
        return Drop("report empty")
    letters = [letter for letter in text if letter.isalpha()]
    if sum(ord(letter) > 0x24F for letter in letters) > 0.3 * len(letters):  # beyond the Latin blocks
        return Drop("report not in English", "most letters are not Latin")
    words = re.findall(r"[^\W\d_]+", text.lower())
    languages = function_words()
    english = sum(word in languages["English"] for word in words) + len(find_mentions(text)) // 2
    for language, known in languages.items():
        foreign = sum(word in known - languages["English"] for word in words)
        if foreign >= 3 and foreign > english:
            return Drop("report not in English", f"looks {language}: {foreign} function words against {english}")
    return None


def _assign(sentence: str, before: tuple[str, ...], under_heading: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    named = mentioned_anatomies(sentence)
    if _CONTINUES.match(sentence) and before:
        return (unique((*before, *named)), "subject") if not named else (unique((*named, *before)), "terms")
    if named:
        return named, "terms"
    if before and _REFERS.search(sentence):
        return before, "subject"
    if under_heading:
        return under_heading, "heading"
    weak = mentioned_anatomies(sentence, is_weak=True)
    return (weak, "weak terms") if weak else ((), "")


def _named_in(clause: str, anatomies: tuple[str, ...]) -> tuple[str, ...]:
    named = mentioned_anatomies(clause) or mentioned_anatomies(clause, is_weak=True)
    return tuple(name for name in named if name in anatomies)


def _join(statements: Sequence[Statement]) -> str:
    return " ".join(_with_stop(statement.sentence) for statement in statements)


def _with_stop(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith(".") else f"{text}."
