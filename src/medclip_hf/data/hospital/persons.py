"""Where a text names a person whom no table or header knows: by title, role, relation or first name.

Whatever stands behind "Dr." is taken for a name. Behind weaker signs ("seen by", "mother") and for first names, words
of medicine and of everyday reports are not, nor are names that a thing bears ("Crohn disease").
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from medclip_hf.data.hospital.folding import CAPITAL, WORDS, folded
from medclip_hf.data.hospital.text_rules import NAME_WORD, Span

_PARTICLE = (
    r"(?:von|van|de|der|den|di|da|du|la|le|zu|zum|zur|vom|bin|ibn|bint|abu|al|el|ul|ter|ten|dos|das|del|della|af|av|"
    r"san|santa|['’]t)"
)
_IS_PARTICLE = re.compile(_PARTICLE, re.IGNORECASE)
_INITIAL = rf"{CAPITAL}\.[ \t]?"
_PARTICLES = rf"(?:{_PARTICLE}[ \t]+|(?:al|el|as|ad|ar|an|ul)[-‐])"
_NAME = re.compile(
    rf"(?:{_INITIAL}){{0,3}}(?:{_PARTICLES}){{0,2}}{NAME_WORD}"
    rf"(?:,?[ \t]+(?:(?:{_PARTICLES}){{0,2}}{NAME_WORD}|{CAPITAL}\b\.?(?!\w))|[ \t]?(?:al|el|"
    rf"ul)[-‐]\w{{2,30}}){{0,3}}"
)
_AND = re.compile(r"[ \t]*(?:,|/|&|;|\b(?:and|und|et|y|e|en|or|oder)\b)[ \t]*(?:and[ \t]+)?")
_TITLE = (
    r"(?:Mr|Mrs|Ms|Miss|Mx|Drs?|Dra|DR|Prof|Profa|PROF|Professor(?:in)?|Doctora?|Docteure?|Doktor|Herrn?|Frau|Hrn?|Mme|Mlle|"
    r"Monsieur|Madame|Sig(?:\.ra|\.na)?|Signora?|Dott(?:\.ssa|or|oressa)?|Sr(?:a|ta)?|Señor(?:a|ita)?|Doña|Dhr|"
    r"Mevr?|Mw|Pani|Sister|Nurse|Schwester|Pfleger|Oberarzt|Oberärztin|Chefarzt|Chefärztin|Assistenzarzt|"
    r"Assistenzärztin|Facharzt|Hausarzt|Hausärztin|Kolleg(?:en?|in)|HERRN?|FRAU)\b\.?|(?:MR|MRS|MS|Fr)\.|\b(?:dhr|"
    r"mevr|mw)\."
)
_TITLE_TAIL = r"(?:(?:med|dent|Dr|Prof|habil|h\.c|phil|rer|nat)\b\.?[ \t]*){0,5}"
_ROLE = (
    r"(?:radiologist|physician|surgeon|doctor|attending|resident|fellow|intern|nurse(?:[ \t]+practitioner)?|midwife|"
    r"technologist|technician|sonographer|radiographer|pathologist|cardiologist|oncologist|neurologist|"
    r"pulmonologist|urologist|gyna?ecologist|pa?ediatrician|consultant|registrar|ana?esthesi(?:ologist|st)|provider|"
    r"clinician|therapist|colleague|transcriptionist|secretary|befunder(?:in)?|zuweiser(?:in)?|überweiser(?:in)?|"
    r"einsender(?:in)?|radiolog(?:e|in|ue|o|a)|radioloog|chirurg(?:in|ien)?|ärztin|arzt|mtra|médecin|m[ée]dic[oa]|"
    r"(?:huis)?arts|cirujan[oa]|paramedic|praxis)"
)
_BY = (
    r"(?:seen|read|reported|dictated|reviewed|interpreted|(?:electronically[ \t]+|co-?)?signed|approved|verified|"
    r"confirmed|performed|transcribed|requested|referred|examined|evaluated|discussed|ordered|asked|prepared|"
    r"authenticated|finali[sz]ed|released|validated|edited|scanned|notified|authori[sz]ed|entered|typed|supervised|"
    r"attended|assisted|board|operated|treated|admitted|accompanied|called|paged|informed|managed)(?:[ \t]+(?:on|"
    r"off))?[ \t]+by"
)
_WITH = (
    r"(?:discuss(?:ed|ion)|reviewed|spoken?|seen|consult(?:ed|ation)|shared|agreed|confirmed|conferred|conversation|"
    r"communicat(?:ed|ion)|call|meeting|rounds)(?:[ \t]+(?:directly|personally|again|in[ \t]+person|"
    r"by[ \t]+(?:tele)?phone|over[ \t]+the[ \t]+phone|at[ \t]+length|in[ \t]+detail))?[ \t]+with"
)
_TO = (
    r"(?:communicated|relayed|conveyed|reported|called|telephoned|phoned|spoke|talked|faxed|sent|referred|told|"
    r"handed|transmitted|paged|addressed|given)(?:[ \t]+(?:verbally|directly|by[ \t]+(?:tele)?phone|over|"
    r"personally))?[ \t]+to"
)
_DIRECT = (
    r"(?:notified|informed|paged|told|contacted|e?mailed|phoned|telephoned|advised|alerted|dear|"
    r"on[ \t]+behalf[ \t]+of|signature)"
)
_LABEL = (
    r"(?:cc|bcc|attn|(?:preliminary|final)[ \t]+read|dictating|dictator|attention|from|to|dictated|reported|signed|"
    r"gezeichnet|gez\.|unterzeichnet|interpreted|referring(?:[ \t]+(?:physician|doctor|md))?|"
    r"ordering(?:[ \t]+(?:physician|provider))?|author|reader)"
)
_OTHER_LANGUAGES = (
    r"(?:vidiert|befundet|diktiert|gezeichnet|unterschrieben|freigegeben|überwiesen|gesehen|"
    r"untersucht)[ \t]+(?:durch|von)|(?:besprochen|r[üu]cksprache|telefonat|abgesprochen|gesprochen)[ \t]+mit|"
    r"informiert[ \t]+wurde|(?:sign|valid|dict|interprét|rédig|réalis|adress|demand)ée?[ \t]+par|(?:relu|"
    r"vu)e?[ \t]+par|(?:transferred|referred|admitted)[ \t]+from|(?:firmad|informad|realizad|revisad|dictad|validad|"
    r"remitid|vist|assinad|laudad)[oa][ \t]+por|(?:firmat|refertat|eseguit|vist|redatt)[oa][ \t]+da|(?:getekend|"
    r"besproken|gezien|aangevraagd|beoordeeld)[ \t]+(?:door|met)"
)
_RELATION = (
    r"(?:mother|father|son|daughter|brother|sister|husband|wife|spouse|partner|aunt|uncle|cousin|grand(?:mother|"
    r"father|son|daughter)|guardian|caretaker|caregiver|carer|girlfriend|boyfriend|friend|neighbou?r|twin|mutter|"
    r"vater|sohn|tochter|bruder|ehemann|ehefrau|gatte|gattin|lebensgefährt(?:e|in)|onkel|tante|enkel(?:in)?|"
    r"betreuer(?:in)?|mère|père|fils|fille|frère|sœur|soeur|épouse|mari|madre|padre|hij[oa]|herman[oa]|espos[oa]|"
    r"marido|moglie|marito|figli[oa]|fratello|sorella|moeder|vader|zoon|dochter|broer|echtgenote)"
)
_NAME_OF = (
    r"(?:patient(?:'s|en)?[ \t]+name|"
    r"(?<!series[ ])(?<!study[ ])(?<!protocol[ ])(?<!file[ ])(?<!drug[ ])(?<![\w-])name|surname|first[ \t]+name|"
    r"last[ \t]+name|given[ \t]+name|family[ \t]+name|"
    r"nachname|vorname|nom|prénom|nombre|apellidos?|cognome|naam)"
)
_BETWEEN = r"[ \t]*[:\-–,]?[ \t]*"
# What a person's name stands behind, and whether the sign is so strong that any capitalised word is one.
_SIGNS = (
    (re.compile(rf"\b(?:{_TITLE})[ \t]*{_TITLE_TAIL}"), True),
    (re.compile(rf"\b(?i:{_NAME_OF})[ \t]*(?:[:=]|\bis\b)?[ \t]*"), True),
    (re.compile(r"\b(?i:patient(?:in)?|pat\.|pt\.?|paciente|pacjentk?a?|hasta|attn|"
                r"врач|доктор|пациент(?:ка)?)[ \t]*[:=,]?[ \t]*"), False),
    (re.compile(rf"\b(?i:{_ROLE})(?:[ \t]*/)?{_BETWEEN}"), False),
    (re.compile(rf"\b(?i:{_BY}|{_WITH}|{_TO}|{_DIRECT}|"
                rf"{_OTHER_LANGUAGES}){_BETWEEN}(?:(?i:the)[ \t]+(?i:{_ROLE}),?[ \t]+)?"), False),
    (re.compile(rf"\b(?i:{_LABEL})[ \t]*[:,][ \t]*"), False),
    (re.compile(rf"\b(?i:{_RELATION}(?:[ -]in[ -]law)?)[ \t]*[,:]?[ \t]*(?:(?:named|called|namens|is)[ \t]+)?"), False),
)  # fmt: skip
_CREDENTIAL = r"(?:MD|M\.D\.|D\.O\.|PhD|Ph\.D\.|FRCR|FRCPC|FACR|RN|MBBS|MBChB|DDS|PA-C|APRN|CRNP)(?!\w)"
_PATTERNS = (
    re.compile(r"\b(?P<it>[^\W\d_][\w'’-]{0,39}\^[^\W\d_][\w'’-]{0,39}(?:\^[\w'’.-]{0,39}){0,3})"),
    re.compile(rf"\b(?:(?:{_TITLE})|(?i:patient(?:in)?|pat|"
               rf"pt)\b\.?)[ \t]*(?P<it>(?:{CAPITAL}\.[ \t]?){{1,3}})(?!\w)"),
    # Behind a title in small letters, or a label, the name may be in small letters as well.
    re.compile(r"\b(?:dr|prof|mrs|herr|herrn)\b\.?[ \t]+(?P<it>[^\W\d_][\w'’-]{2,38})"),
    re.compile(rf"\b(?i:{_BY}|user(?:[ ]?name)?|login)[ \t]*:[ \t]*(?P<it>[^\W\d_][\w.'’-]{{1,38}})"),
    re.compile(rf"\b(?i:{_NAME_OF})[ \t]*[:=][ \t]*(?P<it>[^\W\d_][\w'’-]{{1,38}}(?:,[ \t]*[^\W\d_][\w'’-]{{1,38}})?)"),
    re.compile(r"\b(?i:patient(?:in)?|pat\.|paciente)[ \t]*[:=][ \t]*"
               r"(?P<it>[^\W\d_][\w'’-]{2,38}[ \t,]+[^\W\d_][\w'’-]{2,38})(?=[ \t]*(?:$|[,;.(\n]|\d))"),
)  # fmt: skip
_WEAK_PATTERNS = (
    re.compile(
        rf"(?P<it>{NAME_WORD}(?:[ \t]+{CAPITAL}\.)?(?:[ \t]+(?:{NAME_WORD}|"
        rf"{CAPITAL}{{1,2}}\b))?),?[ \t]+{_CREDENTIAL}"
    ),
    re.compile(rf"(?P<it>{NAME_WORD}[ \t]+{NAME_WORD}),[ \t]*DO(?!\w)"),
    re.compile(
        rf"(?P<it>{NAME_WORD}(?:[ \t]+{CAPITAL}\.)?,?[ \t]+{NAME_WORD}),?[ \t]+"
        r"(?:(?i:is|was|presents|a|an|the)[ \t]+){0,2}\(?\d{1,3}[ -]?(?i:years?|yrs?|y/?o|jahre|jährig)\w*"
    ),
    re.compile(rf"(?<!\w)I,[ \t]+(?P<it>{NAME_WORD}[ \t]+{NAME_WORD}),"),
)
_THING = re.compile(
    r"(?:['’]s)?[ \t]+(?:[a-z-]+[ \t]+)?(?i:disease|syndrome|signs?|criteria|classification|score|stain(?:ing)?|"
    r"tumou?r|lymphoma|nodules?|nodes?|cysts?|hernia|fractures?|ligament|tendon|splint|stents?|catheters?|scale|"
    r"grade|lines?|body|bodies|cells?|method|test|view|projection|procedure|operation|technique|filter|tube|pouch|"
    r"space|canal|node|duct|valve|stage|type|thyroiditis|an?a?emia|palsy|contracture|oesophagus|esophagus|"
    r"phenomenon|technology|sarcoma|ulcer|reflex|angle|index|system|formula|model|deformity|lesion|triangle|ring|"
    r"units?)\b|-[A-ZÀ-Þ]"
)
_ORDINARY_ENDINGS = (
    *("ology", "logie", "ologen", "karzinom", "krebs", "infarkt", "itis", "pathie", "ämie", "ungen", "abteilung"),
    *("ambulanz", "chirurgie", "ometrie", "graphy", "graphie", "scopy", "ectomy", "lymphom", "tumor"),
)
_CAPITALISED = re.compile(NAME_WORD)
_NAME_BEFORE = re.compile(rf"({NAME_WORD}),[ \t]{{1,3}}$")
_REACH = 44  # characters of a name, a comma and spaces
_STOP = re.compile(r"\.|(?=[,;)/\n])|$")
_MIN_CAPITALS = 5  # letters of a first name all in capitals: ANA is an antibody
_WORD = re.compile(r"[\w'’-]+")


def person_spans(text: str) -> Iterator[Span]:
    """Every place in a text where signs say that a person is named; places may overlap."""
    for sign, is_strong in _SIGNS:
        for match in sign.finditer(text):
            yield from _names_at(text, match.end(), is_strong)
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            if not _is_ordinary(_WORD.search(match["it"])[0]):  # type: ignore[index]
                yield *match.span("it"), "NAME"
    for pattern in _WEAK_PATTERNS:
        for match in pattern.finditer(text):
            if not any(_is_ordinary(word) for word in _WORD.findall(match["it"])):
                yield *match.span("it"), "NAME"
    yield from _first_names(text)


def _names_at(text: str, start: int, is_strong: bool) -> Iterator[Span]:
    """The name that begins at a place, and others behind it: "Smith and Patel"."""
    while match := _NAME.match(text, start):
        end = _end_of_name(text, match, is_strong)
        if end is None:
            return
        yield match.start(), end, "NAME"
        following = _AND.match(text, end)
        if following is None:
            return
        start, is_strong = following.end(), False


def _end_of_name(text: str, match: re.Match[str], is_strong: bool) -> int | None:
    """Where a name ends, before the first word that is none; None where it does not even begin."""
    end = None
    for word in _WORD.finditer(match[0]):
        place = match.start() + word.end()
        if len(word[0]) == 1 and word[0].isascii():  # an initial, behind the name where a stop follows
            if end is not None and (stop := _STOP.match(text, place)):
                end = stop.end()
            continue
        if _IS_PARTICLE.fullmatch(word[0]):  # "VAN DER": whether it belongs to a name, the next word tells
            continue
        if _is_function_word(word[0]) if is_strong and end is None else _is_ordinary(word[0]):
            break
        if word[0][0].isupper() or not word[0].isascii():
            end = place
    if end is None or (not is_strong and _THING.match(text, end)):
        return None
    return end


def _first_names(text: str) -> Iterator[Span]:
    """Common first names, with the name behind them, or before them and a comma."""
    for match in _CAPITALISED.finditer(text):
        word, (start, end) = match[0], match.span()
        if word.isupper() and len(word) < _MIN_CAPITALS:
            continue
        if folded(re.split(r"[-‐]", word)[0]) not in _folded_first_names() or _THING.match(text, end):
            continue
        behind = _NAME.match(text, start)
        if behind is not None:
            end = max(end, _end_of_name(text, behind, True) or end)
        before = _NAME_BEFORE.search(text, max(0, start - _REACH), start)
        if before and not _is_ordinary(before[1]):
            start = before.start()
        if not _THING.match(text, end):
            yield start, end, "NAME"


@functools.cache
def _folded_first_names() -> frozenset[str]:
    return frozenset(folded(name) for name in WORDS["given_names"])


def _is_function_word(word: str) -> bool:
    return folded(word) in WORDS["no_names"]


def _is_ordinary(word: str) -> bool:
    """Whether a word is one of medicine or of everyday reports."""
    plain = folded(word).removesuffix("'s")
    return (
        plain in _ordinary_words()
        or plain in WORDS["no_names"]
        or plain.endswith(_ORDINARY_ENDINGS)
        or all(part in _ordinary_words() for part in plain.split("-"))
    )


@functools.cache
def _ordinary_words() -> frozenset[str]:
    """Those of the list, and those of the shipped vocabulary of medicine that it writes in small letters."""
    from medclip_hf.data.concepts.index import read_vocabulary

    vocabulary = Path(__file__).parents[1] / "concepts" / "vocabulary" / "shipped.jsonl"
    names = (name for concept in read_vocabulary(vocabulary) for name in (concept.name, *concept.aliases))
    of_medicine = {word for name in names for word in re.findall(r"[^\W\d_]{3,}", name) if word.islower()}
    listed = WORDS["ordinary"] | WORDS["modalities"] | WORDS["body_parts"] | WORDS["views"]
    return frozenset(folded(word) for word in of_medicine | listed)
