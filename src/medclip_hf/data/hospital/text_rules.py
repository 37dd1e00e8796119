"""What dates, ages, numbers, phones, addresses and institutions look like, whoever's they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from medclip_hf.data.hospital.folding import CAPITAL, WORDS
from medclip_hf.data.hospital.months import MONTH_NAMES

Span = tuple[int, int, str]  # start, end, kind

NAME_WORD = rf"\b{CAPITAL}[\w'’-]{{0,38}}\w"  # every repetition has a bound: hostile texts must not take hours
# "may" and "march" are verbs as well: as months they are written with a capital.
_MONTH = rf"(?:(?i:{'|'.join(MONTH_NAMES)})|May|MAY|March|MARCH|Mar|MAR)\b\.?"
_MONTH_BETWEEN = rf"(?:{_MONTH}|(?i:may|mars?|mart|mei|maj|mag|ott|ago|gen|ocak)\b\.?)"  # with a day and a year
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:(?:19|20)\d\d|['’]\d\d)"
_OF = r"(?:of|de|del)"
_ORDINALS = (
    r"(?:(?:twenty|thirty)[ -])?(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth)|tenth|eleventh|"
    r"twelfth|thirteenth|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth|thirtieth"
)
_BORN = (
    r"(?i:born(?:[ \t]+in)?|geb(?:oren)?\.?(?:[ \t]+(?:am|in))?|jg\.?|jahrgang|n[ée]e?[ \t]+(?:en|le)|"
    r"nacid[oa][ \t]+(?:en|el)|year[ \t]+of[ \t]+birth|yob)"
)
_YEARS_OLD = (
    r"(?:[ \t-]*(?i:years?|yrs?|y[./]?o|jahre?n?|jährige?[rnsm]?|j\.|ans|años?|anni|anos|jaar|jarige|y)(?!\w)|"
    r"[FM]\b)"
)
_OLD = r"9\d|1[0-2]\d"
_ID_WORD = (
    r"(?i:mrn|medical[ \t]+record(?:[ \t]+(?:number|no\.?|nr\.?))?|(?:patient|pat\.?|study|case|order|visit|"
    r"encounter|account|accession|acc|specimen|insurance|policy|member|licen[cs]e|passport|hospital|nhs|"
    r"health[ \t]+card|fall|versicherten|versicherungs|kranken(?:kassen|versicherungs)|ausweis|personal|auftrags?|"
    r"dossier|exam(?:en)?)[ \t.-]*(?:id|identifier|number|no|nr|nummer|num|#)\b\.?|ssn|accession|fallnummer|"
    r"patientennummer|versichertennummer|dossier|kvnr|dni|nie|nif|curp|cpf|bsn|pesel|ahv|nir|codice[ \t]+fiscale|"
    r"aadhaar|nric)|\bID|\bPID|\bFIN"
)
_PROPER = rf"{CAPITAL}(?:\w{{0,2}}\.|[\w'’&-]{{0,39}})"  # a full stop belongs to short words alone: "St."
_STREET_ENDING = (
    r"straße|strasse|str\.|weg|platz|allee|gasse|ufer|damm|ring|straat|gracht|laan|plein|kade|dijk|gatan|vägen|gade|"
    r"vej"
)
# A dotted word is an address of the net where it ends in one of these: a full stop without a space is not enough.
_TOP = r"(?:com|org|net|edu|gov|info|example|local|lan|intranet|de|ch|fr|nl|eu|uk|jp|es|pl)"


@dataclass(frozen=True)
class Rule:
    """A pattern whose group "it", or the whole match, is replaced where `accept` agrees."""

    kind: str
    pattern: re.Pattern[str]
    accept: Callable[[re.Match[str]], bool] = field(default=lambda _: True)


def rule_spans(text: str) -> Iterator[Span]:
    """Every place in a text that looks like one of these, whoever's it is; places may overlap."""
    for rule in _RULES:
        for match in rule.pattern.finditer(text):
            if rule.accept(match):
                start, end = match.span("it") if "it" in rule.pattern.groupindex else match.span()
                yield start, end, rule.kind


def _is_date(match: re.Match[str]) -> bool:
    """Whether three numbers can be a day, a month and a year in any of the usual orders."""
    first, second, third = (int(part) for part in re.findall(r"\d+", match[0])[:3])
    if first > 31:  # the year comes first
        first, second = third, second
    return 1 <= first <= 31 and 1 <= second <= 31 and min(first, second) <= 12


def _is_address_of_net(match: re.Match[str]) -> bool:
    return all(int(part) < 256 for part in match[0].split("."))


def _is_dutch_code(match: re.Match[str]) -> bool:
    """Not "2019 CT Chest"."""
    return match["letters"] not in WORDS["modalities"] and not match["digits"].startswith(("19", "20"))


def _rule(kind: str, pattern: str, accept: Callable[[re.Match[str]], bool] | None = None) -> Rule:
    compiled = re.compile(pattern)
    return Rule(kind, compiled) if accept is None else Rule(kind, compiled, accept)


_RULES = (
    _rule("EMAIL", r"\b[\w.+'-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"),
    _rule(
        "EMAIL",
        r"\b[\w.+'-]{1,64}[ \t]?[(\[](?i:at|ät)[)\]][ \t]?[\w.-]{1,63}(?:[ \t](?i:dot|punkt)[ \t]\w{2,10})?",
    ),
    _rule("EMAIL", r"\b[\w.+'-]{1,64}(?:[ ]dot[ ]\w{1,30}){0,3}[ ]at[ ]\w{1,40}(?:[ ]dot[ ]\w{2,20}){1,3}\b"),
    _rule("URL", r"\b(?i:https?://|ftp://|file://|www\.)[^\s<>\"']+"),
    _rule("URL", rf"\b(?:[a-z0-9-]{{1,63}}\.){{1,5}}{_TOP}(?::\d{{2,5}})?(?:/[^\s<>\"']*|\b(?![.\w@]))"),
    _rule("URL", r"(?<![\w/.:])/(?:[\w.~-]{1,64}/){2,20}[\w.~-]{0,64}|\b[A-Za-z]:\\[^\s<>\"';]+|"
                 r"\\\\[\w.-]+\\[^\s<>\"';]+"),
    _rule("URL", r"\b(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\d)", _is_address_of_net),
    _rule("ID", r"\b\d+(?:\.\d+){5,}\b"),  # DICOM's unique identifiers
    _rule("DATE", r"\b\d{1,2}[./–-]\d{1,2}[./–-](?:\d{4}|\d{2})\b(?![./–-]\d)", _is_date),
    _rule("DATE", r"\b\d{1,2}[./・][ \t]?\d{1,2}[./・][ \t]?(?:19|20)\d\d\b", _is_date),
    _rule("DATE", r"\b\d{1,2}[./ -][ \t]?(?:I{1,3}|IV|VI{0,3}|IX|XI{0,2})[./ -][ \t]?(?:(?:19|20)\d\d|\d\d)\b"),
    _rule("DATE", r"(?<![\d.,])(?:0[1-9]|[12]\d|3[01])\.(?:0[1-9]|1[0-2])\.(?=[ \t]+[a-zäöü])"),
    _rule("DATE", r"\b(?:19|20)\d\d[./-]\d{1,2}[./-]\d{1,2}(?:T\d\d:\d\d\S*)?\b", _is_date),
    _rule("DATE", r"\b(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{6})?\b"),
    _rule("DATE", r"(?:(?:19|20)\d\d|"
                  r"[^\W\d_]{2}\d{1,2})[ \t]?[年년][ \t]?\d{1,2}[ \t]?[月월](?:[ \t]?\d{1,2}[ \t]?[日일])?"),
    _rule("DATE", r"\b(?:0?[1-9]|1[0-2])/(?:19|20)\d\d\b"),
    _rule("DATE", rf"{_BORN}[ \t]*:?[ \t]*(?P<it>(?:19|20)\d\d)\b"),
    _rule("DATE", r"(?<![\w*])\*[ \t]?(?P<it>(?:19|20)\d\d)\b(?![.*])"),
    _rule(
        "DATE",
        rf"\b(?i:on|dated|since|from|am|vom|den|seit|le|du|el|(?:mon|tues?|wed|thu(?:rs)?|fri|sat|sun)(?:(?:nes|"
        rf"ur)?day)?)"
        rf"[ \t,.]+(?P<it>{_DAY}[./]{_DAY}\b(?![./]?\d)(?!\s*(?:cm|mm))\.?)",
    ),
    _rule(
        "DATE",
        rf"(?<![\w./]){_DAY}(?i:st|nd|rd|th|er|º)?\.?[ \t-]*(?:{_OF}[ \t]+)?{_MONTH}"
        rf"(?:[ \t,-]*(?:{_OF}[ \t]+)?{_YEAR}\b|-\d\d\b|[ \t]\d\d\b(?![.,]?\d|[ \t]*(?:%|[cm]?m\b|ml\b|x\b|/|"
        rf"of\b)))?",
    ),
    _rule(
        "DATE",
        rf"(?<![\w./]){_DAY}\.?[ \t-]{{0,2}}(?:{_OF}[ \t]+)?{_MONTH_BETWEEN}[ \t,-]{{0,2}}(?:{_OF}[ \t]+)?(?:19|"
        rf"20)\d\d\b",
    ),
    _rule("DATE", rf"(?<!\w){_DAY}(?i:{'|'.join(name for name in MONTH_NAMES if len(name) == 3)}|may|"
                  rf"mar)(?:\d{{4}}|\d\d)\b"),
    _rule("DATE", rf"\b(?i:{_ORDINALS})[ \t]+(?:of[ \t]+)?{_MONTH}(?:[ \t,]*{_YEAR}\b)?"),
    _rule(
        "DATE",
        rf"\b(?:(?:19|20)\d\d[ \t,]+)?{_MONTH}[ \t]*{_DAY}(?i:st|nd|rd|th)?\b(?!\s*(?:cm|mm|%))(?:[ \t,]*{_YEAR})?",
    ),
    _rule("DATE", rf"\b{_MONTH}[ \t,]*(?:{_OF}[ \t]+)?{_YEAR}\b"),
    _rule("TIME", r"\b(?:[01]?\d|2[0-3]):[0-5]\d:[0-5]\d\b"),
    _rule("TIME", r"\b(?:[01]?\d|2[0-3])[:.][0-5]\d[ \t]*(?i:am|pm|a\.m\.|p\.m\.|uhr|hrs?|hours)(?!\w)"),
    _rule("AGE", rf"\b(?P<it>{_OLD})(?={_YEARS_OLD})"),
    _rule("AGE", rf"\b(?i:aged?|(?:di[ ])?anni|alter(?:[ \t]+von)?|edad|âge|età|"
                 rf"leeftijd)[ \t]*[:=]?[ \t]*(?P<it>{_OLD})\b(?![.,]\d|\s*(?:%|mm|cm))"),
    _rule("AGE", r"\b(?P<it>(?i:ninety(?:[ -](?:one|two|three|four|five|six|seven|eight|"
                 r"nine))?))(?=[ -]years?[ -]old)"),
    _rule("PHONE", r"(?i:\b(?:tel(?:ephone|efon)?|phone|fax|mobile|cell|pager|handy|call|ext)\b[ .:#]*"
                   r"(?:number|no\.?|nr\.?)?[ :]*(?:at|on)?[ \t]*)(?P<it>[+(]?\d[\d ()/.-]{2,}\d)"),
    _rule("PHONE", r"(?<![\w.])\+\d{1,3}[ ()/.-]*\d[\d ()/.-]{5,}\d"),
    _rule("PHONE", r"(?<![\w.])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b"),
    _rule("PHONE", r"(?<![\w.])0\d(?:[ .-]\d\d){4}\b"),
    _rule("PHONE", r"(?<![\w.,/-])0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}\b(?![.,]\d)"),
    _rule("ID", rf"(?:{_ID_WORD})[ \t]*[:#=.]*[ \t]*(?:is[ \t]+)?(?P<it>[A-Za-z]{{0,6}}[-_/]?\d[\w./-]*\b)"),
    _rule("ID", r"(?<![\w.])[A-Z]{1,5}[-_/]?\d{5,}\w*\b"),
    _rule("ID", r"(?<![\w.,])\d{6,}[A-Z]?\b"),
    _rule("ID", r"\b\d{3}[ -]\d{2}[ -]\d{4}\b"),
    _rule("ID", r"\b(?=[A-Z]*\d)(?=\w*\d{3})[A-Z\d]{12,40}\b"),
    _rule("ID", r"\b756\.\d{4}\.\d{4}\.\d\d\b"),  # of Switzerland's insurance
    _rule("ID", r"\b[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]\b"),  # Italy's tax code
    _rule("ID", r"\b[12][ ]?\d\d[ ]?(?:0[1-9]|1[0-2])[ ]?\d[\dAB][ ]?\d{3}[ ]?\d{3}(?:[ ]?\d\d)?\b"),  # France's
    _rule(
        "ADDRESS",
        rf"\b\d{{1,5}}[A-Za-z]?[ \t]+(?:{CAPITAL}[\w'.-]{{1,39}}[ \t]+){{1,3}}"
        r"(?i:street|st|road|rd|avenue|ave|lane|ln|drive|boulevard|blvd|court|place|square|terrace|highway|"
        r"parkway)\b\.?",
    ),
    _rule("ADDRESS", rf"(?:{NAME_WORD}[ \t]+){{1,2}}(?:Street|Road|Avenue|Boulevard)\b"),
    _rule("ADDRESS", rf"\b{CAPITAL}[\w-]{{0,39}}(?i:{_STREET_ENDING})[ \t]+\d+[a-z]?\b"
          rf"(?:,?[ \t]+\d{{4,5}}(?:[ \t][A-Z]{{2}})?[ \t]+{NAME_WORD})?"),
    _rule("ADDRESS", rf"(?:\b\d{{1,4}},?[ \t]+)?\b(?i:rue|avenue|calle|boulevard|plaza|"
                     rf"rua)[ \t]+(?:d[eu]s?[ \t]+|la[ \t]+|del?[ \t]+)*"
          rf"{NAME_WORD}(?:,?[ \t]+\d{{1,4}}\b)?(?:,[ \t]+\d{{4,5}}[ \t]+{NAME_WORD})?"),
    _rule("ADDRESS", rf"(?:{NAME_WORD}[ \t]+){{1,4}}\d{{1,4}}[a-z]?,?[ \t]+\d{{4,5}}[ \t]+{NAME_WORD}"),
    _rule("ADDRESS", rf"\b(?:[DAFIB]|CH|NL)-\d{{4,5}}(?:[ \t]+{NAME_WORD})?"),
    _rule("ADDRESS", rf"(?:{NAME_WORD},?[ \t]+)?\b[A-Z]{{2}}[ \t]+\d{{5}}(?:-\d{{4}})?\b"),
    _rule("ADDRESS", rf"(?:{NAME_WORD},?[ \t]+)?\b[A-Z]{{1,2}}\d[A-Z\d]?[ \t]\d[ABD-HJLNP-UW-Z]{{2}}\b"),
    _rule("ADDRESS", rf"\b(?P<digits>[1-9]\d{{3}})[ \t]?(?P<letters>[A-Z]{{2}})[ \t]+{NAME_WORD}", _is_dutch_code),
    _rule("ADDRESS", rf"\bVia[ \t]+(?:d[ei]l?[ \t]+)?{NAME_WORD}(?:[ \t]+{NAME_WORD})?,?[ \t]+\d{{1,4}}\b"),
    _rule("ADDRESS", rf"\b(?i:ul|al)\.[ \t]+{NAME_WORD}[ \t]+\d{{1,4}}\b"),
    _rule("ADDRESS", rf"(?<![\d-])\d\d-\d{{3}}[ \t]+{NAME_WORD}"),
    _rule("ADDRESS", r"〒[ \t]?\d{3}-?\d{4}[^\s,.、。]*"),
    _rule("ADDRESS", r"\b(?i:p\.?[ \t]?o\.?[ \t]?box|postfach)[ \t]+\d+"),
    _rule(
        "INSTITUTION",
        rf"\b(?:(?:{_PROPER}|of|de|the)[ \t]+){{0,5}}{_PROPER}[ \t]+"
        r"(?:Hospital|Clinics?|Infirmary|Klinikum|Klinik|Krankenhaus|Spital|Hospice|Healthcare|"
        r"(?:Medical|Imaging|Health|Cancer|Radiology)[ \t]+"
        r"(?:Cent(?:er|re)|System|Group|Institute|Network|Trust))\b(?:[ \t]+of[ \t]+\w+)?",
    ),
    _rule("INSTITUTION", rf"(?!In\b){NAME_WORD}[ \t]+(?:General|Memorial|Infirmary)(?=[,.;)]|[ \t]*$)"),
    _rule("INSTITUTION", rf"\b(?:St|Saint|Sankt)\.?[ \t]+{CAPITAL}[\w-]{{2,38}}['’]s?(?!\w)"),
    _rule(
        "INSTITUTION",
        rf"\b(?:University[ \t]+of|Universitäts(?:klinikum|klinik|spital|medizin)|Klinikum|Klinik|Krankenhaus|"
        rf"H[oô]pital|"
        rf"Hospital|Charit[eé]|CHU|UMC|UZ|AKH|LKH|Mount)(?:[ \t]+(?:of|de|der|am|an|im|in|rechts|links|"
        rf"St\.?))*[ \t]+{NAME_WORD}"
        rf"(?:[ \t]+(?:de[ \t]+)?{NAME_WORD})?",
    ),
)  # fmt: skip
