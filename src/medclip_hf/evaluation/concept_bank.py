"""Which concepts of a large vocabulary an image shows, and where: a bank of concept vectors, and annotation with it.

The vectors of tens of thousands of concepts are made once for a model and kept on disk; an image is then one matrix
product away from all of them. A bank is of no use with another model, so it names the one it was made with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.ndimage import label as label_components
from torch import Tensor

from medclip_hf.data.concepts.index import Concept
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.data.stages import Drop
from medclip_hf.evaluation.encoders import Encoder
from medclip_hf.processing.conceptclip import to_rgb

logger = logging.getLogger(__name__)

TEMPLATES = ("{}",)
REGION_THRESHOLD = 0.5  # of a map scaled to [0, 1]
_FORMAT_VERSION = 1
_NAMES_AT_ONCE = 512
_CONCEPTS_AT_ONCE = 4096  # against all patches of an image: 12 MB of float32 for 729 patches

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ConceptBank:
    """Vectors of K concepts, made by one model.

    Args:
        identity: of the model and its preprocessing, as `Encoder.identity` gives it.
        templates: that the vectors are averaged over.
        concept_ids: K identifiers, CUIs for instance.
        names: K preferred names.
        text_embeds: (K, D), of whole prompts, L2-normalised.
        concept_embeds: (K, D), of the names inside them; None where the model has no patch heads.
        set_aside: concepts of the vocabulary without a vector, and why.
    """

    identity: str
    templates: tuple[str, ...]
    concept_ids: tuple[str, ...]
    names: tuple[str, ...]
    text_embeds: Tensor = field(repr=False)
    concept_embeds: Tensor | None = field(repr=False, default=None)
    set_aside: tuple[Drop, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """Hash of what the vectors belong to: model, templates, concepts and their order."""
        parts = [self.identity, self.templates, self.concept_ids, self.names]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """The folder, with `concept_bank.safetensors` and, written last, `concept_bank.json` in it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {"text_embeds": self.text_embeds, "concept_embeds": self.concept_embeds}
        partial = target / f".concept_bank.safetensors.{os.getpid()}.tmp"
        # In both files: a crash between the two must not pair these names with the vectors of another bank.
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None},
            partial,
            metadata={"fingerprint": self.fingerprint},
        )
        partial.replace(target / "concept_bank.safetensors")
        described = {
            "format_version": _FORMAT_VERSION,
            "identity": self.identity,
            "fingerprint": self.fingerprint,
            "templates": self.templates,
            "concept_ids": self.concept_ids,
            "names": self.names,
            "set_aside": [asdict(drop) for drop in self.set_aside],
        }
        write_text_atomically(target / "concept_bank.json", json.dumps(described, ensure_ascii=False) + "\n")
        return target

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> ConceptBank:
        """The bank that `save` wrote, its vectors on the encoder's device.

        Raises:
            ValueError: there is none, it cannot be read, or it was made with another model than `encoder`.
        """
        source = Path(folder)
        try:
            described = json.loads((source / "concept_bank.json").read_text(encoding="utf-8"))
            identity = described["identity"]
            if identity == encoder.identity:
                tensors, fingerprint = _read_tensors(source / "concept_bank.safetensors", str(encoder.device))
                bank = cls(
                    identity=identity,
                    templates=tuple(described["templates"]),
                    concept_ids=tuple(described["concept_ids"]),
                    names=tuple(described["names"]),
                    text_embeds=tensors["text_embeds"],
                    concept_embeds=tensors.get("concept_embeds"),
                    set_aside=tuple(Drop(**drop) for drop in described["set_aside"]),
                )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{source} holds no concept bank that can be read: {error}. Build it again.") from error
        if identity != encoder.identity:
            raise ValueError(
                f"the concept bank in {source} was made with another model or preprocessing ({identity[:12]}) than "
                f"{encoder.name} ({encoder.identity[:12]}): its scores would mean nothing. Build it again."
            )
        if bank.fingerprint != fingerprint or len(bank.names) != len(bank.text_embeds):
            raise ValueError(f"{source}: names and vectors are not of the same concept bank. Build it again.")
        return bank


@dataclass(frozen=True)
class ConceptHit:
    """A concept that an image may show.

    Args:
        concept_id: identifier, a CUI for instance.
        name: preferred name.
        score: mixture of the two that follow, in [0, 1].
        global_score: probability from the whole image.
        local_score: from the best patches; None without patch heads.
        box: (left, top, right, bottom) in pixels of the picture around the hot region with the map's peak; None without
            patch heads.
        concept_map: (rows, columns), cosines; None without patch heads.
    """

    concept_id: str
    name: str
    score: float
    global_score: float
    local_score: float | None = None
    box: Box | None = None
    concept_map: NDArray[np.float32] | None = field(repr=False, default=None)

    def as_dict(self) -> dict[str, Any]:
        """All but the map, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "concept_map"}


@torch.no_grad()
def build_concept_bank(
    encoder: Encoder,
    vocabulary: Iterable[Concept],
    *,
    templates: Sequence[str] = TEMPLATES,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConceptBank:
    """The bank of a vocabulary; a name beyond the model's token limit is set aside, as is a repeated identifier.

    Args:
        encoder: see `encoders.load_encoder`.
        vocabulary: concepts, see `data.concepts.index.read_vocabulary`; only preferred names are embedded.
        templates: prompts with one ``{}``; the vectors are averaged over them.
        on_progress: called with (names embedded, names in all).

    Raises:
        ValueError: no concept is left, or a template is none.
    """
    concepts, set_aside = _distinct(vocabulary)
    names = sorted({concept.name for concept in concepts}, key=lambda name: (len(name), name))  # like lengths together
    if not names:
        raise ValueError("the vocabulary holds no concept")
    rows: dict[str, tuple[Tensor, Tensor | None]] = {}
    too_long: dict[str, str] = {}
    for first in range(0, len(names), _NAMES_AT_ONCE):
        _embed_names(encoder, names[first : first + _NAMES_AT_ONCE], templates, rows, too_long)
        if on_progress is not None:
            on_progress(min(first + _NAMES_AT_ONCE, len(names)), len(names))
    kept = [concept for concept in concepts if concept.name in rows]
    set_aside += [
        Drop("name cannot be embedded", too_long[concept.name], concept.concept_id)
        for concept in concepts
        if concept.name in too_long
    ]
    if not kept:
        raise ValueError(f"no name of the vocabulary can be embedded: {set_aside[0].detail}")
    if set_aside:
        logger.warning("%d concepts of the vocabulary were set aside, see set_aside", len(set_aside))
    local = [rows[concept.name][1] for concept in kept]
    return ConceptBank(
        identity=encoder.identity,
        templates=tuple(templates),
        concept_ids=tuple(concept.concept_id for concept in kept),
        names=tuple(concept.name for concept in kept),
        text_embeds=torch.stack([rows[concept.name][0] for concept in kept]),
        concept_embeds=torch.stack([row for row in local if row is not None]) if local[0] is not None else None,
        set_aside=tuple(set_aside),
    )


@torch.no_grad()
def annotate_image(
    image: Any,
    bank: ConceptBank,
    encoder: Encoder,
    *,
    top_k: int = 10,
    local_weight: float = 0.5,
    shortlist: int | None = None,
    region_threshold: float = REGION_THRESHOLD,
) -> list[ConceptHit]:
    """The `top_k` concepts of the bank that fit the image best, with score and region, best first.

    score = (1 − local_weight) · σ(s ⟨v, t⟩ + b) + local_weight · σ(s_c maxₚ ⟨p, c⟩ + b_c), the probabilities that the
    two alignments were trained for. They rank concepts; whether they are calibrated is another question, see
    `evaluation.calibration`.

    Args:
        image: PIL image, path or encoded bytes.
        bank: made with this encoder.
        encoder: see `encoders.load_encoder`.
        top_k: how many; all of a smaller bank.
        local_weight: in [0, 1].
        shortlist: compare patches with so many concepts only, the best of the whole image: faster, and may miss small
            things. None: with all.
        region_threshold: of the map scaled to [0, 1]: what is hot.

    Raises:
        ValueError: a bank of another model, an image that cannot be read, options out of range, vectors that are not
            finite.
    """
    if bank.identity != encoder.identity:
        raise ValueError(f"the concept bank was made with another model than {encoder.name}: build one with it.")
    if top_k < 1 or not 0.0 <= local_weight <= 1.0 or (shortlist is not None and shortlist < 1):
        raise ValueError(
            f"expected top_k ≥ 1, local_weight in [0, 1] and shortlist ≥ 1 or None, got {top_k}, {local_weight} and "
            f"{shortlist}"
        )
    if not 0.0 < region_threshold <= 1.0:
        raise ValueError(f"region_threshold must lie in (0, 1], got {region_threshold}")
    picture = to_rgb(image)
    pixels = encoder.preprocess(picture)
    embeds = encoder.encode_pixels(pixels[None])
    cosine = bank.text_embeds @ embeds.image_embeds[0]
    if not torch.isfinite(cosine).all():
        raise ValueError(
            f"{encoder.name} gives vectors that are not finite: its weights are damaged, or its precision overflows."
        )
    whole = (encoder.logit_scale * cosine.double() + encoder.logit_bias).sigmoid()
    if embeds.patch_embeds is None or bank.concept_embeds is None or encoder.concept_logit_scale is None:
        best = whole.topk(min(top_k, len(bank))).indices.tolist()
        return [ConceptHit(bank.concept_ids[k], bank.names[k], float(whole[k]), float(whole[k])) for k in best]
    patches = embeds.patch_embeds[0]
    some = None if shortlist is None or shortlist >= len(bank) else whole.topk(shortlist).indices
    concepts = bank.concept_embeds if some is None else bank.concept_embeds[some]
    whole = whole if some is None else whole[some]
    similarity = torch.cat([(patches @ part.T).amax(dim=0) for part in concepts.split(_CONCEPTS_AT_ONCE)])
    local = (encoder.concept_logit_scale * similarity.double() + encoder.concept_logit_bias).sigmoid()
    score = local_weight * local + (1.0 - local_weight) * whole
    chosen = score.topk(min(top_k, len(score))).indices
    maps = (concepts[chosen] @ patches.T).unflatten(1, _grid(len(patches), pixels.shape[1], pixels.shape[2]))
    numbers = chosen if some is None else some[chosen]
    return [
        ConceptHit(
            concept_id=bank.concept_ids[number],
            name=bank.names[number],
            score=float(score[place]),
            global_score=float(whole[place]),
            local_score=float(local[place]),
            box=hot_box(concept_map, picture.size, region_threshold),
            concept_map=concept_map,
        )
        for number, place, concept_map in zip(
            numbers.tolist(), chosen.tolist(), maps.float().cpu().numpy(), strict=True
        )
    ]


def hot_box(concept_map: NDArray[np.float32], size_wh: tuple[int, int], threshold: float = REGION_THRESHOLD) -> Box:
    """(left, top, right, bottom) in pixels around the connected hot cells that hold the map's peak.

    The whole picture where the map is flat.

    Args:
        concept_map: (rows, columns).
        size_wh: of the picture, pixels.
        threshold: of the map scaled to [0, 1].
    """
    low, high = float(concept_map.min()), float(concept_map.max())
    scaled = (concept_map - low) / (high - low) if high > low else np.ones_like(concept_map)
    components, _ = label_components(scaled >= threshold)
    peak = np.unravel_index(int(concept_map.argmax()), concept_map.shape)
    rows, columns = np.nonzero(components == components[peak])
    cell_height, cell_width = size_wh[1] / concept_map.shape[0], size_wh[0] / concept_map.shape[1]
    return (
        round(columns.min() * cell_width),
        round(rows.min() * cell_height),
        round((columns.max() + 1) * cell_width),
        round((rows.max() + 1) * cell_height),
    )


def _read_tensors(path: Path, device: str) -> tuple[dict[str, Tensor], str]:
    """The vectors of a bank and the fingerprint written with them."""
    with safe_open(path, framework="pt", device=device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, (file.metadata() or {}).get("fingerprint", "")


def _distinct(vocabulary: Iterable[Concept]) -> tuple[list[Concept], list[Drop]]:
    """The concepts, each identifier once, and those that repeat one."""
    concepts: dict[str, Concept] = {}
    set_aside = []
    for concept in vocabulary:
        if concept.concept_id in concepts:
            detail = f"{concept.name!r}, first named {concepts[concept.concept_id].name!r}"
            set_aside.append(Drop("identifier repeated", detail, concept.concept_id))
        else:
            concepts[concept.concept_id] = concept
    return list(concepts.values()), set_aside


def _embed_names(
    encoder: Encoder,
    names: Sequence[str],
    templates: Sequence[str],
    rows: dict[str, tuple[Tensor, Tensor | None]],
    too_long: dict[str, str],
) -> None:
    """Put the vectors of names into `rows`; a name that is refused is found by halving and noted in `too_long`."""
    try:
        text_embeds, concept_embeds = encoder.encode_classes(names, templates).averaged()
    except ValueError as error:
        if len(names) == 1:
            if _refuses_templates(encoder, templates):
                raise
            too_long[names[0]] = str(error)
            return
        half = len(names) // 2
        _embed_names(encoder, names[:half], templates, rows, too_long)
        _embed_names(encoder, names[half:], templates, rows, too_long)
        return
    for place, name in enumerate(names):
        rows[name] = (text_embeds[place], None if concept_embeds is None else concept_embeds[place])


def _refuses_templates(encoder: Encoder, templates: Sequence[str]) -> bool:
    """Whether the templates, and not a name, are what the encoder refuses."""
    try:
        encoder.encode_classes(["a"], templates)
    except ValueError:
        return True
    return False


def _grid(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of patches of an input of that many pixels."""
    rows = round(math.sqrt(num_patches * height / width))
    if rows < 1 or num_patches % rows:
        raise ValueError(f"{num_patches} patches do not lie on a grid over {height} × {width} pixels")
    return rows, num_patches // rows
