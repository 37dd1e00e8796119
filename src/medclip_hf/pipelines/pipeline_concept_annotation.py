"""The pipeline "medical-concept-annotation": an image in, the medical concepts that it shows out, each with its place.

This file travels to the Hub: it works without the package, DICOM files and the shipped vocabulary aside.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Pipeline

from .pipeline_saving import forget_pipelines, save_pipeline

try:
    from medclip_hf.evaluation.zero_shot import embed_classes, zero_shot_scores
except ImportError:
    from .zero_shot import embed_classes, zero_shot_scores  # type: ignore[no-redef] # its copy, in a saved folder
try:
    from medclip_hf.pipelines.inputs import read_picture, shipped_vocabulary
except ImportError:
    read_picture = shipped_vocabulary = None  # type: ignore[assignment]

DEFAULT_TEMPLATES = ("{}",)
_MAX_VOCABULARIES = 4  # whose vectors are kept
_TEXT_BATCH = 256
_DICOM_PREAMBLE = 128  # bytes before the mark
_ARGUMENTS = {
    "concepts",
    "templates",
    "top_k",
    "threshold",
    "activation",
    "top_patches",
    "local_weight",
    "return_maps",
}

Size = tuple[float, float]  # width, height


@dataclass(frozen=True)
class _Vocabulary:
    names: tuple[str, ...]
    cuis: tuple[str | None, ...]
    text_embeds: torch.Tensor  # (K, D)
    concept_embeds: torch.Tensor | None  # (K, D)
    source: Any = None  # what must stay alive as long as its id is a key


_Pipeline: Any = Pipeline  # its annotations are made for the subclasses of transformers


class ConceptAnnotationPipeline(_Pipeline):
    """Concepts of a vocabulary that an image shows, best first, by ConceptCLIP.

    Each image gives a list of dicts:

        label         name of the concept
        cui           its identifier, None where the vocabulary has none
        score         probability in [0, 1], the mean of the next two
        global_score  from the whole image
        local_score   from its best patches; None for a model of the first stage
        map           (rows, columns) float32, cosine of each patch with the concept; None as above
        box           (left, top, right, bottom) in pixels of the image, around the part of the map that holds its
                      highest value and lies above half its range; None as above

    Concepts are encoded once a vocabulary. Scores are sigmoids with the trained scale and bias, each concept for
    itself; with `activation="softmax"` the concepts of the vocabulary share a sum of 1.

    Args of a call:
        images: path, URL, PIL image or array, or a list, generator or data set of them. Files may be DICOM.
        concepts: names, (name, CUI) pairs, mappings with "canonical_name" and "concept_id", or the path of a JSON
            lines file of such mappings; or a `ConceptBank`, whose vectors are on disk already. Default: the vocabulary
            that the package ships.
        top_k: how many to give back; None: all.
        threshold: least score.
        templates: prompts with one ``{}``, averaged.
        activation: "sigmoid" or "softmax".
        top_patches: how many patches the local score takes.
        local_weight: share of the local score, in [0, 1].
        return_maps: False leaves out maps and boxes.
        batch_size, num_workers: as everywhere in transformers.

    Examples:
        >>> annotate = pipeline("medical-concept-annotation", model="my-conceptclip")
        >>> annotate("radiograph.dcm", concepts=[("pleural effusion", "C0032227"), "pneumothorax"], top_k=1)
        [{'label': 'pleural effusion', 'cui': 'C0032227', 'score': 0.91, ...}]
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.model.config, "model_type", None) != "conceptclip":
            raise ValueError(
                "medical-concept-annotation needs a ConceptCLIP, whose patches and concepts share a space; got "
                f"{type(self.model).__name__}."
            )
        forget_pipelines(self.model.config)
        self._vocabularies: dict[Any, _Vocabulary] = {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Concepts of an image, or of each of several: see the class."""
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model, processor and code, so that the folder works where the package is not installed."""
        save_pipeline(self, save_directory, **kwargs)

    def _sanitize_parameters(self, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        arguments.pop("local_files_only", None)  # of `pipeline`, which hands it on
        if unknown := sorted(arguments.keys() - _ARGUMENTS):
            raise ValueError(f"medical-concept-annotation knows no {unknown}; it takes {sorted(_ARGUMENTS)}.")
        top_k = arguments.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be a whole number of 1 or more, or None for all concepts, got {top_k}.")
        concepts = arguments.get("concepts")
        if concepts is not None and not hasattr(concepts, "text_embeds"):
            arguments["concepts"] = read_concepts(concepts)  # once a call, not once an image
        return {}, arguments, {}

    def preprocess(self, image: Any, **_: Any) -> dict[str, Any]:
        """Pixels (1, 3, H, W) of one image, and its width and height."""
        if read_picture is not None:
            picture = read_picture(image)
        elif is_dicom_file(image):
            raise ValueError(f"{image} is a DICOM file: reading it needs the package, pip install 'medclip-hf[ct]'.")
        else:
            picture = sys.modules[type(self.processor).__module__].to_rgb(image)
        return {"pixel_values": self.processor(images=picture)["pixel_values"], "size": picture.size}

    def _forward(
        self,
        inputs: Mapping[str, Any],
        concepts: Any = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        top_k: int | None = 10,
        threshold: float = 0.0,
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        top_patches: int = 1,
        local_weight: float = 0.5,
        return_maps: bool = True,
    ) -> dict[str, Any]:
        vocabulary = self._encoded(concepts, tuple(templates))
        outputs = self.model(pixel_values=inputs["pixel_values"], return_logits=False)
        sizes = inputs["size"] if isinstance(inputs["size"], list) else [inputs["size"]]
        found = []
        for row, size in enumerate(sizes):  # one by one: patches times concepts is a large array
            patches = None if outputs.patch_embeds is None else outputs.patch_embeds[row : row + 1]
            scores = zero_shot_scores(
                outputs.image_embeds[row : row + 1],
                vocabulary.text_embeds,
                self.model.logit_scale.exp(),
                patches,
                None if patches is None else vocabulary.concept_embeds,
                None if patches is None else self.model.concept_logit_scale.exp(),
                logit_bias=self.model.logit_bias,
                concept_logit_bias=0.0 if patches is None else self.model.concept_logit_bias,
                activation=activation,
                top_patches=top_patches,
                local_weight=local_weight,
            )
            mixed = scores.mixed_scores[0]
            best = [place for place in np.argsort(-mixed, kind="stable")[:top_k] if mixed[place] >= threshold]
            entries = [_entry(vocabulary, scores, place) for place in best]
            if return_maps and patches is not None and vocabulary.concept_embeds is not None and best:
                self._add_maps(entries, vocabulary.concept_embeds[best], patches[0], size)
            found.append(entries)
        return {"found": found}

    def postprocess(self, outputs: Mapping[str, Any], **_: Any) -> list[dict[str, Any]]:
        """The concepts of one image."""
        found = outputs["found"]
        return found[0] if found and isinstance(found[0], list) else found

    def _encoded(self, concepts: Any, templates: tuple[str, ...]) -> _Vocabulary:
        """The vocabulary's vectors, kept for the next image."""
        if hasattr(concepts, "text_embeds"):
            return self._of_bank(concepts)
        pairs = read_concepts(concepts)
        key = (pairs, templates)
        if key not in self._vocabularies:
            names = tuple(name for name, _ in pairs)
            classes = embed_classes(self.model, self.processor, names, templates, batch_size=_TEXT_BATCH)
            text_embeds, concept_embeds = classes.averaged()
            while len(self._vocabularies) >= _MAX_VOCABULARIES:
                self._vocabularies.pop(next(iter(self._vocabularies)))
            cuis = tuple(cui for _, cui in pairs)
            self._vocabularies[key] = _Vocabulary(names, cuis, text_embeds, concept_embeds)
        return self._vocabularies[key]

    def _of_bank(self, bank: Any) -> _Vocabulary:
        """The vectors of a concept bank; that it is this model's was checked when it was loaded."""
        key = id(bank)
        if key not in self._vocabularies:
            if bank.text_embeds.shape[1] != self.model.config.vision_config.hidden_size:
                raise ValueError(
                    f"the concept bank is another model's: its vectors have {bank.text_embeds.shape[1]} numbers."
                )
            text_embeds = bank.text_embeds.to(self.model.device)
            concept_embeds = None if bank.concept_embeds is None else bank.concept_embeds.to(self.model.device)
            self._vocabularies = {key: _Vocabulary(bank.names, bank.concept_ids, text_embeds, concept_embeds, bank)}
        return self._vocabularies[key]

    def _add_maps(
        self, entries: list[dict[str, Any]], concept_embeds: torch.Tensor, patch_embeds: torch.Tensor, size: Size
    ) -> None:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        similarity = (concept_embeds.float() @ patch_embeds.float().T).unflatten(1, (side, side)).cpu().numpy()
        # Pixels behind the last whole patch belong to none: 6 of 384 with patches of 14.
        covered = side * vision.patch_size / vision.image_size
        for entry, concept_map in zip(entries, similarity, strict=True):
            entry["map"] = concept_map
            entry["box"] = box_of_map(concept_map, (size[0] * covered, size[1] * covered))


def _entry(vocabulary: _Vocabulary, scores: Any, place: int) -> dict[str, Any]:
    local = scores.local_scores
    return {
        "label": vocabulary.names[place],
        "cui": vocabulary.cuis[place],
        "score": float(scores.mixed_scores[0, place]),
        "global_score": float(scores.global_scores[0, place]),
        "local_score": None if local is None else float(local[0, place]),
        "map": None,
        "box": None,
    }


class _Concepts(tuple[tuple[str, str | None], ...]):
    """Concepts that were read and checked."""


def read_concepts(concepts: Any) -> _Concepts:
    """(name, CUI or None) of each concept; of equal names the first counts.

    Args:
        concepts: see `ConceptAnnotationPipeline`.

    Raises:
        ValueError: none came, or one that is no concept.
    """
    if isinstance(concepts, _Concepts):
        return concepts
    if concepts is None:
        return _shipped_concepts()
    if isinstance(concepts, str | Path):
        concepts = _read_lines(Path(concepts))
    found: dict[str, str | None] = {}
    for concept in concepts:
        name, cui = _name_and_cui(concept)
        found.setdefault(name, cui)
    if not found:
        raise ValueError("there is no concept to look for: concepts is empty.")
    return _Concepts(found.items())


@lru_cache(maxsize=1)
def _shipped_concepts() -> _Concepts:
    if shipped_vocabulary is None:
        raise ValueError(
            "name the concepts to look for with concepts=[...]: the vocabulary that is taken otherwise comes with the "
            "package, pip install medclip-hf."
        )
    return read_concepts(shipped_vocabulary())


def _read_lines(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"concepts={str(path)!r} is no file. Give a list of names, or the path of a JSON lines file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    concepts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                concepts.append(json.loads(line))
                _name_and_cui(concepts[-1])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return concepts


def _name_and_cui(concept: Any) -> tuple[str, str | None]:
    name: Any
    cui: Any
    if isinstance(concept, str):
        name, cui = concept, None
    elif isinstance(concept, Mapping):
        name, cui = concept.get("canonical_name"), concept.get("concept_id")
    else:
        name, cui = (*concept, None)[:2] if isinstance(concept, Sequence) else (None, None)
    if not isinstance(name, str) or not name.strip() or not (cui is None or isinstance(cui, str)):
        raise ValueError(
            f'{concept!r} is no concept; expected a name, (name, CUI), or {{"canonical_name": ..., "concept_id": ...}}.'
        )
    return name.strip(), cui


def box_of_map(concept_map: np.ndarray, size: Size) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels around the peak of a map: the connected part above half its range.

    Args:
        concept_map: (rows, columns).
        size: (width, height) in pixels of what the map covers.
    """
    high = concept_map >= (concept_map.min() + concept_map.max()) / 2
    region = np.zeros_like(high)
    region[np.unravel_index(concept_map.argmax(), concept_map.shape)] = True
    while True:  # grows by one step up, down, left and right until it fills its part
        padded = np.pad(region, 1)
        grown = high & (region | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2])
        if (grown == region).all():
            break
        region = grown
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    height, width = size[1] / concept_map.shape[0], size[0] / concept_map.shape[1]
    return (
        round(columns[0] * width),
        round(rows[0] * height),
        round((columns[-1] + 1) * width),
        round((rows[-1] + 1) * height),
    )


def is_dicom_file(image: Any) -> bool:
    """Whether it is the path of a file with the DICOM mark."""
    if not isinstance(image, str | Path):
        return False
    try:
        if not Path(image).is_file():
            return False
        with Path(image).open("rb") as file:
            return file.read(_DICOM_PREAMBLE + 4)[_DICOM_PREAMBLE:] == b"DICM"
    except OSError:  # a data URL is too long for a name
        return False


__all__ = ["ConceptAnnotationPipeline"]
