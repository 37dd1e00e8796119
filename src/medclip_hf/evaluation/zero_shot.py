"""Zero-shot classification with ConceptCLIP's protocol: the whole image and its best patches against prompts.

Global score: image vector against the class's text vector. Local score: mean over the best patches against the vector
of the class name's own tokens inside the prompt. The published score is the even mixture of both probabilities.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Activation = Literal["softmax", "sigmoid"]
PUBLISHED_TOP_PATCHES = 128  # of 729 (27 × 27), as the release's zero-shot script sets it
_PUBLISHED_NUM_PATCHES = 729
PUBLISHED_LOCAL_WEIGHT = 0.5
DEFAULT_TEMPLATES = ("{}", "a medical image presents {}", "this image shows {}.")
_SLOT = "{}"


@dataclass(frozen=True)
class ClassEmbeddings:
    """What stands for each class in the joint space, template by template.

    Args:
        class_names: K names.
        templates: T templates.
        text_embeds: (T, K, D), of the whole prompts, L2-normalised.
        concept_embeds: (T, K, D), of the class names inside them, L2-normalised; None without patch heads.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    text_embeds: Tensor
    concept_embeds: Tensor | None = None

    def averaged(self, template_weights: Sequence[float] | None = None) -> tuple[Tensor, Tensor | None]:
        """Text and concept vectors (K, D) averaged over templates and normalised again.

        Args:
            template_weights: one per template, not negative, not all 0; a one-hot list picks a single template.
                None: all alike, as published.
        """
        concepts = None if self.concept_embeds is None else average_templates(self.concept_embeds, template_weights)
        return average_templates(self.text_embeds, template_weights), concepts


@dataclass(frozen=True)
class ZeroShotScores:
    """Scores (N, K) of N images for K classes.

    Args:
        global_scores: probabilities from the whole image.
        local_scores: from the best patches; None where the model has no patch heads.
        mixed_scores: their mixture; equal to `global_scores` without local ones.
        unreadable: (position in the images given, reason) of those that have no row.
    """

    global_scores: NDArray[np.float64]
    local_scores: NDArray[np.float64] | None
    mixed_scores: NDArray[np.float64]
    unreadable: tuple[tuple[int, str], ...] = field(default=())


def zero_shot_scores(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    patch_embeds: Tensor | None = None,
    concept_embeds: Tensor | None = None,
    concept_logit_scale: Tensor | float | None = None,
    *,
    logit_bias: Tensor | float = 0.0,
    concept_logit_bias: Tensor | float = 0.0,
    activation: Activation = "softmax",
    top_patches: int = PUBLISHED_TOP_PATCHES,
    local_weight: float = PUBLISHED_LOCAL_WEIGHT,
) -> ZeroShotScores:
    """Scores of images for classes from embeddings alone.

    global = act(s · ⟨v, t⟩ + b); local = act(mean of the `top_patches` greatest s_c · ⟨p, c⟩ + b_c);
    mixed = local_weight · local + (1 − local_weight) · global. Computed in float64: sigmoids of trained scales saturate
    in float32 and tie.

    Args:
        image_embeds: (N, D), L2-normalised.
        text_embeds: (K, D), L2-normalised.
        logit_scale: s, exponentiated.
        patch_embeds: (N, P, D), L2-normalised; None: global alone.
        concept_embeds: (K, D), L2-normalised; given with `patch_embeds`.
        concept_logit_scale: s_c, exponentiated; given with `patch_embeds`.
        logit_bias: b; the published protocol leaves both biases out. They do not change a softmax; they make sigmoids
            the probabilities the model was trained for.
        concept_logit_bias: b_c.
        activation: "softmax" where exactly one class is true, "sigmoid" where each is true or not by itself.
        top_patches: all patches where the image has fewer.
        local_weight: in [0, 1].

    Raises:
        ValueError: shapes that do not fit, a part of the local score given without the others, unknown activation,
            `top_patches` below 1, `local_weight` outside [0, 1].
    """
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {activation!r}")
    if top_patches < 1 or not 0.0 <= local_weight <= 1.0:
        raise ValueError(f"expected top_patches ≥ 1 and local_weight in [0, 1], got {top_patches} and {local_weight}")
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"image_embeds (N, D) and text_embeds (K, D) must share D, got {tuple(image_embeds.shape)} and "
            f"{tuple(text_embeds.shape)}"
        )
    local_parts = (patch_embeds, concept_embeds, concept_logit_scale)
    if any(part is None for part in local_parts) and any(part is not None for part in local_parts):
        raise ValueError("patch_embeds, concept_embeds and concept_logit_scale belong together: give all or none")
    best = None
    if patch_embeds is not None and concept_embeds is not None:
        best = best_patch_mean(patch_embeds, concept_embeds, top_patches)
    return scores_from_cosines(
        _cosine(image_embeds, text_embeds),
        logit_scale,
        best,
        concept_logit_scale,
        logit_bias=logit_bias,
        concept_logit_bias=concept_logit_bias,
        activation=activation,
        local_weight=local_weight,
    )


def scores_from_cosines(
    cosines: Tensor,
    logit_scale: Tensor | float,
    best_patch_means: Tensor | None = None,
    concept_logit_scale: Tensor | float | None = None,
    *,
    logit_bias: Tensor | float = 0.0,
    concept_logit_bias: Tensor | float = 0.0,
    activation: Activation = "softmax",
    local_weight: float = PUBLISHED_LOCAL_WEIGHT,
) -> ZeroShotScores:
    """The scores of `zero_shot_scores` from what a cache holds.

    Args:
        cosines: (N, K) of images with classes.
        logit_scale: see `zero_shot_scores`.
        best_patch_means: (N, K), from `best_patch_mean`; None: global alone.
        concept_logit_scale: given with `best_patch_means`.
        logit_bias: see `zero_shot_scores`.
        concept_logit_bias: of patches.
        activation: "softmax" or "sigmoid".
        local_weight: in [0, 1].

    Raises:
        ValueError: shapes that differ, a cosine that is not finite, unknown activation, `local_weight` outside [0, 1].
    """
    if activation not in ("softmax", "sigmoid") or not 0.0 <= local_weight <= 1.0:
        raise ValueError(
            f"activation must be 'softmax' or 'sigmoid' and local_weight in [0, 1], got {activation!r}, {local_weight}"
        )
    if not torch.isfinite(cosines).all() or (
        best_patch_means is not None and not torch.isfinite(best_patch_means).all()
    ):
        raise ValueError("similarities hold values that are not finite: the embeddings are damaged")
    whole = _activate(_number(logit_scale) * cosines.double() + _number(logit_bias), activation)
    if best_patch_means is None or concept_logit_scale is None:
        return ZeroShotScores(whole, None, whole)
    if best_patch_means.shape != cosines.shape:
        raise ValueError(f"expected (N, K) alike, got {tuple(cosines.shape)} and {tuple(best_patch_means.shape)}")
    local = _activate(
        _number(concept_logit_scale) * best_patch_means.double() + _number(concept_logit_bias), activation
    )
    return ZeroShotScores(whole, local, local_weight * local + (1.0 - local_weight) * whole)


def best_patch_mean(patch_embeds: Tensor, concept_embeds: Tensor, top_patches: int) -> Tensor:
    """Mean cosine (N, K), float64, of each concept with its `top_patches` best patches of each image.

    Args:
        patch_embeds: (N, P, D), L2-normalised.
        concept_embeds: (K, D), L2-normalised.
        top_patches: all P where it is more.
    """
    if patch_embeds.ndim != 3 or concept_embeds.ndim != 2 or patch_embeds.shape[2] != concept_embeds.shape[1]:
        raise ValueError(
            f"patch_embeds (N, P, D) and concept_embeds (K, D) must share D, got {tuple(patch_embeds.shape)} and "
            f"{tuple(concept_embeds.shape)}"
        )
    similarity = patch_embeds.float() @ concept_embeds.float().T  # (N, P, K)
    return similarity.topk(min(top_patches, similarity.shape[1]), dim=1).values.double().mean(dim=1)


def published_share_of_patches(num_patches: int) -> int:
    """As large a share of a model's patches as the published 128 are of 729; at least 1."""
    return max(1, round(PUBLISHED_TOP_PATCHES * num_patches / _PUBLISHED_NUM_PATCHES))


def average_templates(embeds: Tensor, template_weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean (K, D) over templates of embeddings (T, K, D), normalised again; see `ClassEmbeddings.averaged`."""
    if template_weights is None:
        weights = torch.ones(len(embeds))
    else:
        weights = torch.tensor(template_weights, dtype=torch.float32)
    if weights.shape != (len(embeds),) or weights.min() < 0 or weights.sum() <= 0:
        raise ValueError(f"expected {len(embeds)} template weights, not negative and not all 0, got {weights.tolist()}")
    mean = torch.einsum("t,tkd->kd", weights.to(embeds) / weights.sum().to(embeds), embeds)
    return torch.nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def embed_classes(
    model: Any,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
) -> ClassEmbeddings:
    """Embeddings of every class in every template.

    Args:
        model: a `ConceptCLIPModel`, in evaluation mode.
        processor: its `ConceptCLIPProcessor`.
        class_names: what to score, each once.
        templates: prompts with one ``{}`` where the name goes.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: no class, a name that is empty or repeated, a template without exactly one ``{}``, a name that the
            token limit cuts off.
    """
    names, patterns = check_prompts(class_names, templates)
    prompts = [(pattern, name) for pattern in patterns for name in names]
    text_parts, concept_parts = [], []
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        spans = [[(pattern.index(_SLOT), pattern.index(_SLOT) + len(name))] for pattern, name in chunk]
        texts = [pattern.replace(_SLOT, name) for pattern, name in chunk]
        inputs = processor(text=texts, concept_char_spans=spans, return_tensors="pt").to(model.device)
        cut = [text for text, is_kept in zip(texts, inputs["concept_mask"][:, 0].tolist(), strict=True) if not is_kept]
        if cut:
            raise ValueError(f"the class name does not fit into the token limit: {cut[0]!r}; shorten name or template")
        outputs = model(**inputs, return_logits=False)
        text_parts.append(outputs.text_embeds.float())
        if outputs.concept_embeds is not None:
            concept_parts.append(outputs.concept_embeds[:, 0].float())
    shape = (len(patterns), len(names), -1)
    return ClassEmbeddings(
        names,
        patterns,
        torch.cat(text_parts).reshape(shape),
        torch.cat(concept_parts).reshape(shape) if concept_parts else None,
    )


@torch.no_grad()
def classify_images(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    template_weights: Sequence[float] | None = None,
    activation: Activation = "softmax",
    use_bias: bool = False,
    top_patches: int = PUBLISHED_TOP_PATCHES,
    local_weight: float = PUBLISHED_LOCAL_WEIGHT,
    batch_size: int = 16,
) -> ZeroShotScores:
    """Zero-shot scores of images for classes: the published protocol from pictures to probabilities.

    Images are read batch by batch and their patches forgotten, so memory does not grow with their number. One that
    cannot be read is left out and named in `unreadable`.

    Args:
        model: a `ConceptCLIPModel`; put into evaluation mode for the time.
        processor: its `ConceptCLIPProcessor`.
        images: paths, PIL images or arrays; may be a generator.
        class_names: see `embed_classes`.
        templates: see `embed_classes`.
        template_weights: see `ClassEmbeddings.averaged`.
        activation: see `zero_shot_scores`.
        use_bias: add the trained biases; False as published.
        top_patches: see `zero_shot_scores`.
        local_weight: see `zero_shot_scores`.
        batch_size: images a forward pass.

    Raises:
        ValueError: as `embed_classes` and `zero_shot_scores`; no image at all.
    """
    was_training = model.training
    model.eval()
    try:
        classes = embed_classes(model, processor, class_names, templates)
        text_embeds, concept_embeds = classes.averaged(template_weights)
        parts, unreadable = [], []
        for position, batch in _batches(images, batch_size):
            pixel_values, failed = _read_images(processor, batch, position)
            unreadable += failed
            if pixel_values is None:
                continue
            outputs = model(pixel_values=pixel_values.to(model.device), return_logits=False)
            has_patches = outputs.patch_embeds is not None
            parts.append(
                zero_shot_scores(
                    outputs.image_embeds,
                    text_embeds,
                    model.logit_scale.exp(),
                    outputs.patch_embeds,
                    concept_embeds,
                    model.concept_logit_scale.exp() if has_patches else None,
                    logit_bias=model.logit_bias if use_bias else 0.0,
                    concept_logit_bias=model.concept_logit_bias if use_bias and has_patches else 0.0,
                    activation=activation,
                    top_patches=top_patches,
                    local_weight=local_weight,
                )
            )
    finally:
        model.train(was_training)
    if not parts:
        raise ValueError("no image could be scored: " + (unreadable[0][1] if unreadable else "none was given"))
    return _concatenate(parts, unreadable)


def _concatenate(parts: Sequence[ZeroShotScores], unreadable: Sequence[tuple[int, str]]) -> ZeroShotScores:
    local = [part.local_scores for part in parts if part.local_scores is not None]
    return ZeroShotScores(
        np.concatenate([part.global_scores for part in parts]),
        np.concatenate(local) if local else None,
        np.concatenate([part.mixed_scores for part in parts]),
        tuple(unreadable),
    )


def _read_images(processor: Any, images: Sequence[Any], position: int) -> tuple[Tensor | None, list[tuple[int, str]]]:
    """Pixels of the images that can be read, and position and reason of the others."""
    pixels, failed = [], []
    for offset, image in enumerate(images):
        try:
            pixels.append(processor(images=image, return_tensors="pt")["pixel_values"])
        except (OSError, ValueError) as error:
            failed.append((position + offset, f"{type(error).__name__}: {error}"))
    return (torch.cat(pixels) if pixels else None), failed


def _batches(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    iterator, position = iter(items), 0
    while batch := list(islice(iterator, size)):
        yield position, batch
        position += len(batch)


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and templates as tuples, after a look at them.

    Raises:
        ValueError: none of one kind, a name that is empty or repeated, a template without exactly one ``{}``.
    """
    if isinstance(class_names, str) or isinstance(templates, str):
        raise ValueError("class_names and templates must be lists of strings, not one string")
    names, patterns = tuple(class_names), tuple(templates)
    if not names or not patterns:
        raise ValueError(f"expected at least one class and one template, got {len(names)} and {len(patterns)}")
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"class names must be different and not empty, got {list(names)}")
    for pattern in patterns:
        if pattern.count(_SLOT) != 1:
            raise ValueError(f"a template holds {_SLOT} exactly once, where the class name goes, got {pattern!r}")
    return names, patterns


def _cosine(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    return (image_embeds.float() @ text_embeds.float().T).double()


def _number(value: Tensor | float) -> float:
    return float(value.detach().double()) if isinstance(value, Tensor) else float(value)


def _activate(logits: Tensor, activation: Activation) -> NDArray[np.float64]:
    probabilities = logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid()
    return probabilities.detach().cpu().numpy()
