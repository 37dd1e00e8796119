"""Captions of the drawn figures: varied wording around modality and findings, with the place of every concept."""

from dataclasses import dataclass

import numpy as np

from medclip_hf.data.phantoms.findings import FINDINGS, Finding
from medclip_hf.data.phantoms.looks import Look
from medclip_hf.data.records import ConceptMention

OPENINGS = (
    "{modality} showing {findings}.",
    "{modality} demonstrates {findings}.",
    "{modality} with {findings}.",
    "{modality} of a {age}-year-old {person}: {findings}.",
    "Figure {number}. {findings} on {modality}.",
    "Representative {modality}: {findings}.",
    "({letter}) {modality} obtained {when} reveals {findings} (arrow).",
    "{findings} can be seen on this {modality}.",
)
ASIDES = (
    "Scale bar as indicated.",
    "The patient had been referred from another hospital.",
    "Reproduced with the same window settings.",
    "Arrowheads mark the area of interest.",
    "Follow-up after {number} weeks was uneventful.",
    "Image quality was adequate.",
    "The remaining structures are unremarkable.",
    "Informed consent was obtained from the {person}.",
)
NEGATIONS = ("No {finding}.", "No evidence of {finding}.", "{finding} was excluded.", "Negative for {finding}.")
QUALIFIERS = ("", "", "", "obvious ", "subtle ", "typical ", "known ", "incidental ")
WHENS = ("at admission", "before treatment", "after treatment", "three months later")
PEOPLE = ("man", "woman", "patient", "boy", "girl")
SYNONYM_SHARE, PLACE_SHARE, NEGATION_SHARE, ASIDE_SHARE = 0.25, 0.15, 0.1, 0.2


@dataclass(frozen=True)
class DrawnPlace:
    """A finding that is in the picture, with the centre of its region in [-1, 1] (x to the right, y down)."""

    finding: Finding
    centre_xy: tuple[float, float]


class _Text:
    """A caption under construction that remembers where concepts were written."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[ConceptMention] = []

    def write(self, words: str) -> None:
        self.text += words[:1].upper() + words[1:] if not self.text or self.text.endswith(". ") else words

    def write_concept(self, finding: Finding, words: str) -> None:
        start = len(self.text)
        self.write(words)
        self.mentions.append(
            ConceptMention(finding.concept_id, finding.name, start, len(self.text), semantic_type="Finding")
        )


def write_caption(
    look: Look, places: list[DrawnPlace], rng: np.random.Generator
) -> tuple[str, tuple[ConceptMention, ...]]:
    """A caption and its concept mentions, in the order of the text.

    Sometimes it denies a finding that is not in the picture; such a mention is no concept.

    Args:
        look: the modality to name.
        places: what is in the picture; every one is named once, in random order.
        rng: source of all choices.
    """
    fields = {
        "modality": _pick(look.names, rng),
        "age": str(rng.integers(4, 90)),
        "number": str(rng.integers(1, 12)),
        "letter": "abcdef"[rng.integers(6)],
        "person": _pick(PEOPLE, rng),
        "when": _pick(WHENS, rng),
    }
    caption = _Text()
    before, after = _pick(OPENINGS, rng).split("{findings}")
    caption.write(before.format(**fields))
    _write_findings(caption, places, rng)
    caption.write(after.format(**fields))
    if rng.random() < NEGATION_SHARE:
        present = {place.finding.concept_id for place in places}
        absent = [finding for finding in FINDINGS if finding.concept_id not in present]
        caption.write(" ")
        caption.write(_pick(NEGATIONS, rng).format(finding=absent[rng.integers(len(absent))].name))
    if rng.random() < ASIDE_SHARE:
        caption.write(" ")
        caption.write(_pick(ASIDES, rng).format(**fields))
    return caption.text, tuple(caption.mentions)


def _write_findings(caption: _Text, places: list[DrawnPlace], rng: np.random.Generator) -> None:
    for position, chosen in enumerate(rng.permutation(len(places))):
        place = places[chosen]
        if position:
            caption.write(" and " if position == len(places) - 1 else ", ")
        caption.write(_pick(QUALIFIERS, rng))
        names = place.finding.synonyms if rng.random() < SYNONYM_SHARE else (place.finding.name,)
        caption.write_concept(place.finding, _pick(names, rng))
        if rng.random() < PLACE_SHARE:
            caption.write(f" in the {_quadrant(place.centre_xy)}")


def _quadrant(centre_xy: tuple[float, float]) -> str:
    """Words for a quarter as a viewer of the picture sees it, not for the side of a patient."""
    x, y = centre_xy
    return f"{'upper' if y < 0 else 'lower'} {'left' if x < 0 else 'right'} part of the image"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
