"""Concept annotation: does a score tell which images show a concept? One AUC per concept, not one over all of them.

Every concept is asked for by a pair of prompts, with and without it ("This is dermatoscopy of {}." against "This is
dermatoscopy."), as the release of ConceptCLIP does. Its single AUC over all pairs of image and concept also rewards
knowing which concept is frequent; it is given beside the others, for comparison with published numbers only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medclip_hf.evaluation.encoders import Encoder
from medclip_hf.evaluation.metrics import ClassAUROC, auroc, auroc_per_class
from medclip_hf.evaluation.zero_shot import average_templates, best_patch_mean

PUBLISHED_LOCAL_WEIGHT = 0.5


@dataclass(frozen=True)
class AnnotationPrompts:
    """Vectors of C concepts and of the prompt without a concept, averaged over templates and L2-normalised.

    Args:
        concept_names: C names.
        text_embeds: (C, D), of prompts with the concept.
        neutral_embed: (D,), of prompts without.
        concept_embeds: (C, D), of the concept's own tokens; None without patch heads.
        neutral_concept_embed: (D,), of the tokens of prompts without; None without patch heads.
    """

    concept_names: tuple[str, ...]
    text_embeds: Tensor
    neutral_embed: Tensor
    concept_embeds: Tensor | None = None
    neutral_concept_embed: Tensor | None = None


@dataclass(frozen=True)
class AnnotationScores:
    """Probabilities (N, C), float64, that N images show C concepts.

    Args:
        global_scores: from whole images.
        local_scores: from patches; None where the model has no patch heads.
        mixed_scores: both, weighted; `global_scores` without local ones.
        unreadable: (position in the images given, reason) of those that have no row.
    """

    global_scores: NDArray[np.float64]
    local_scores: NDArray[np.float64] | None
    mixed_scores: NDArray[np.float64]
    unreadable: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class AnnotationFigures:
    """AUC per concept and their mean, of each kind of score.

    Args:
        global_only: of `AnnotationScores.global_scores`.
        local_only: of the local scores; None without patch heads.
        mixed: of the mixture.
        pooled: "global", "local", "mixed" → one AUC over all pairs of image and concept, the published figure; None
            where it is undefined.
    """

    global_only: ClassAUROC
    local_only: ClassAUROC | None
    mixed: ClassAUROC
    pooled: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def embed_prompts(
    encoder: Encoder, concept_names: Sequence[str], templates: Sequence[str], neutral_prompts: Sequence[str]
) -> AnnotationPrompts:
    """The vectors that `annotation_scores` compares images with.

    Args:
        encoder: see `encoders.load_encoder`.
        concept_names: what to look for, each once.
        templates: prompts with one ``{}``.
        neutral_prompts: prompts of the same kind without a concept.

    Raises:
        ValueError: as `Encoder.encode_classes`; no neutral prompt.
    """
    if isinstance(neutral_prompts, str) or not len(neutral_prompts):
        raise ValueError("neutral_prompts must be a list of at least one prompt that names no concept")
    text_embeds, concept_embeds = encoder.encode_classes(concept_names, templates).averaged()
    neutral = encoder.encode_classes(list(neutral_prompts), ["{}"])  # each prompt is its own class, all its tokens
    neutral_concept = neutral.concept_embeds
    return AnnotationPrompts(
        tuple(concept_names),
        text_embeds,
        average_templates(neutral.text_embeds[0][:, None])[0],
        concept_embeds,
        None if neutral_concept is None else average_templates(neutral_concept[0][:, None])[0],
    )


def annotation_scores(
    image_embeds: Tensor,
    prompts: AnnotationPrompts,
    logit_scale: float,
    patch_embeds: Tensor | None = None,
    concept_logit_scale: float | None = None,
    *,
    top_patches: int | None = None,
    local_weight: float = PUBLISHED_LOCAL_WEIGHT,
) -> AnnotationScores:
    """Scores of images for concepts: softmax over the pair of prompts, of the whole image and of its patches.

    global = σ(s (⟨v, t⟩ − ⟨v, t₀⟩)); local = σ(s_c (m(c) − m(c₀))), m the mean cosine of the best `top_patches`;
    mixed = local_weight · local + (1 − local_weight) · global.

    Args:
        image_embeds: (N, D), L2-normalised.
        prompts: see `embed_prompts`.
        logit_scale: s, exponentiated.
        patch_embeds: (N, P, D), L2-normalised; None: global alone.
        concept_logit_scale: s_c, exponentiated; given with `patch_embeds`.
        top_patches: None: all patches, as published; 1 is what PC-Align trains.
        local_weight: in [0, 1].

    Raises:
        ValueError: shapes that do not fit, `top_patches` below 1, `local_weight` outside [0, 1].
    """
    if image_embeds.ndim != 2 or image_embeds.shape[1:] != prompts.neutral_embed.shape:
        raise ValueError(
            f"image_embeds must be (N, {len(prompts.neutral_embed)}) like the prompts, got {tuple(image_embeds.shape)}"
        )
    if (top_patches is not None and top_patches < 1) or not 0.0 <= local_weight <= 1.0:
        raise ValueError(f"expected top_patches ≥ 1 and local_weight in [0, 1], got {top_patches} and {local_weight}")
    difference = prompts.text_embeds - prompts.neutral_embed
    whole = _sigmoid(logit_scale * (image_embeds.float() @ difference.T.float()).double())
    if patch_embeds is None or prompts.concept_embeds is None or prompts.neutral_concept_embed is None:
        return AnnotationScores(whole, None, whole)
    if concept_logit_scale is None:
        raise ValueError("patch_embeds came without concept_logit_scale")
    both = torch.cat([prompts.concept_embeds, prompts.neutral_concept_embed[None]])
    if top_patches is None:  # the mean of cosines is the cosine with the mean
        similarity = (patch_embeds.float().mean(dim=1) @ both.T.float()).double()
    else:
        similarity = best_patch_mean(patch_embeds, both, top_patches)
    local = _sigmoid(concept_logit_scale * (similarity[:, :-1] - similarity[:, -1:]))
    return AnnotationScores(whole, local, local_weight * local + (1.0 - local_weight) * whole)


def score_images(
    encoder: Encoder,
    images: Iterable[Any],
    prompts: AnnotationPrompts,
    *,
    top_patches: int | None = None,
    local_weight: float = PUBLISHED_LOCAL_WEIGHT,
    batch_size: int = 16,
) -> AnnotationScores:
    """Scores of pictures for concepts; patches are forgotten batch by batch, unreadable pictures left out and named.

    Args:
        encoder: see `encoders.load_encoder`.
        images: paths, PIL images or encoded bytes; may be a generator.
        prompts: see `embed_prompts`.
        top_patches: see `annotation_scores`.
        local_weight: see `annotation_scores`.
        batch_size: pictures a forward pass.

    Raises:
        ValueError: no picture can be read.
    """
    parts: list[AnnotationScores] = []
    unreadable: list[tuple[int, str]] = []
    iterator, position = iter(images), 0
    while batch := list(islice(iterator, batch_size)):
        pixels = []
        for offset, image in enumerate(batch):
            try:
                pixels.append(encoder.preprocess(image))
            except (OSError, ValueError) as error:
                unreadable.append((position + offset, f"{type(error).__name__}: {error}"))
        position += len(batch)
        if pixels:
            embeds = encoder.encode_pixels(torch.stack(pixels))
            options = {"top_patches": top_patches, "local_weight": local_weight}
            parts.append(
                annotation_scores(
                    embeds.image_embeds,
                    prompts,
                    encoder.logit_scale,
                    embeds.patch_embeds,
                    encoder.concept_logit_scale,
                    **options,  # type: ignore[arg-type]
                )
            )
    if not parts:
        raise ValueError("no image could be annotated: " + (unreadable[0][1] if unreadable else "none was given"))
    local = [part.local_scores for part in parts if part.local_scores is not None]
    return AnnotationScores(
        np.concatenate([part.global_scores for part in parts]),
        np.concatenate(local) if local else None,
        np.concatenate([part.mixed_scores for part in parts]),
        tuple(unreadable),
    )


def annotation_figures(
    scores: AnnotationScores,
    labels: ArrayLike,
    concept_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> AnnotationFigures:
    """AUC per concept with intervals, global, local and mixed; concepts without an AUC are named, not averaged.

    Args:
        scores: of `annotation_scores`.
        labels: (N, C), bool or 0 and 1.
        concept_names: C names.
        groups: (N,) patient of each image.
        num_resamples: 0: no intervals.
        seed: of the resampling.

    Raises:
        ValueError: as `metrics.auroc_per_class`.
    """
    kinds = {"global": scores.global_scores, "local": scores.local_scores, "mixed": scores.mixed_scores}
    areas = {
        name: auroc_per_class(values, labels, concept_names, groups=groups, num_resamples=num_resamples, seed=seed)
        for name, values in kinds.items()
        if values is not None
    }
    truth = np.asarray(labels).ravel()
    pooled = {name: auroc(values.ravel(), truth) for name, values in kinds.items() if values is not None}
    return AnnotationFigures(areas["global"], areas.get("local"), areas["mixed"], pooled)


def _sigmoid(logits: Tensor) -> NDArray[np.float64]:
    return logits.detach().cpu().sigmoid().numpy()
