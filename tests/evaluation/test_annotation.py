"""Concept annotation: hand-checked scores of the pair of prompts, and one AUC per concept."""

import math

import numpy as np
import pytest
import torch

from medclip_hf.evaluation.annotation import (
    AnnotationPrompts,
    AnnotationScores,
    annotation_figures,
    annotation_scores,
    embed_prompts,
    score_images,
)
from medclip_hf.evaluation.encoders import Encoder, ImageEmbeddings
from medclip_hf.evaluation.zero_shot import ClassEmbeddings


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def sigmoid(value):
    return 1.0 / (1.0 + math.exp(-value))


PROMPTS = AnnotationPrompts(
    ("a", "b"), unit([1, 0, 0], [0, 1, 0]), unit([0, 0, 1])[0], unit([1, 0, 0], [0, 1, 0]), unit([0, 0, 1])[0]
)


def test_the_global_score_is_the_softmax_over_with_and_without():
    scores = annotation_scores(unit([1, 0, 0]), PROMPTS, 2.0)
    assert scores.global_scores == pytest.approx(np.array([[sigmoid(2.0), 0.5]]))
    assert scores.local_scores is None
    assert scores.mixed_scores is scores.global_scores


def test_the_local_score_is_the_mean_over_all_patches_unless_the_best_are_asked_for():
    patches = unit([1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1])[None]
    everywhere = annotation_scores(unit([1, 0, 0]), PROMPTS, 2.0, patches, 4.0)
    assert everywhere.local_scores == pytest.approx(np.array([[sigmoid(4 * (0.25 - 0.75)), sigmoid(4 * (0.0 - 0.75))]]))
    best = annotation_scores(unit([1, 0, 0]), PROMPTS, 2.0, patches, 4.0, top_patches=1)
    assert best.local_scores == pytest.approx(np.array([[0.5, sigmoid(-4.0)]]))
    quarter = annotation_scores(unit([1, 0, 0]), PROMPTS, 2.0, patches, 4.0, local_weight=0.25)
    assert quarter.mixed_scores == pytest.approx(0.25 * quarter.local_scores + 0.75 * quarter.global_scores)


def test_an_auc_over_all_pairs_rewards_knowing_which_concept_is_frequent():
    labels = np.array([[1, 0]] * 9 + [[0, 1]])
    by_frequency = np.tile([0.9, 0.1], (10, 1))  # the same for every image: knows nothing of it
    figures = annotation_figures(
        AnnotationScores(by_frequency, None, by_frequency), labels, ["a", "b"], num_resamples=0
    )
    assert figures.mixed.macro.value == 0.5
    assert figures.pooled["mixed"] == pytest.approx(0.9)


def test_perfect_scores_reach_one_and_a_concept_without_positives_is_named():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    figures = annotation_figures(
        AnnotationScores(labels * 0.6 + 0.1, labels * 0.8, labels * 0.7), labels, ["a", "b", "rare"], num_resamples=0
    )
    assert figures.global_only.macro.value == figures.local_only.macro.value == figures.mixed.macro.value == 1.0
    assert figures.mixed.undefined == ("rare",)
    assert figures.as_dict()["pooled"]["local"] == 1.0


def test_shapes_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        annotation_scores(unit([1, 0]), PROMPTS, 1.0)
    with pytest.raises(ValueError, match="local_weight"):
        annotation_scores(unit([1, 0, 0]), PROMPTS, 1.0, local_weight=2.0)
    with pytest.raises(ValueError, match="concept_logit_scale"):
        annotation_scores(unit([1, 0, 0]), PROMPTS, 1.0, unit([1, 0, 0])[None])


def planted_encoder():
    """Each text stands for its first letter's axis; an image is the axis of its number, a negative one is broken."""

    def forward_classes(names, templates):
        rows = torch.stack([torch.eye(3)["abn".index(name[0])] for name in names])
        return ClassEmbeddings(tuple(names), tuple(templates), *[rows.expand(len(templates), -1, -1)] * 2)

    def preprocess(image):
        if image < 0:
            raise ValueError("broken")
        return torch.full((3, 2, 2), float(image))

    def forward_pixels(pixels):
        rows = torch.eye(3)[pixels[:, 0, 0, 0].long()]
        return ImageEmbeddings(rows, torch.ones(len(rows)), rows[:, None])

    options = {"logit_bias": 0.0, "concept_logit_scale": 3.0, "concept_logit_bias": 0.0, "num_patches": 1}
    return Encoder(
        name="planted",
        identity="planted",
        device=torch.device("cpu"),
        dtype=torch.float32,
        logit_scale=2.0,
        preprocess=preprocess,
        forward_pixels=forward_pixels,
        forward_texts=lambda texts: torch.eye(3)[: len(texts)],
        forward_classes=forward_classes,
        **options,
    )


def test_pictures_are_scored_in_batches_and_unreadable_ones_named():
    encoder = planted_encoder()
    prompts = embed_prompts(encoder, ["a", "b"], ["{}", "{} again"], ["nothing"])
    scores = score_images(encoder, iter([0, -1, 1, 2]), prompts, batch_size=2)
    assert scores.unreadable == ((1, "ValueError: broken"),)
    assert scores.global_scores == pytest.approx(
        np.array([[sigmoid(2), 0.5], [0.5, sigmoid(2)], [sigmoid(-2), sigmoid(-2)]])
    )
    with pytest.raises(ValueError, match="no image could be annotated: ValueError: broken"):
        score_images(encoder, [-1], prompts)
    with pytest.raises(ValueError, match="neutral_prompts"):
        embed_prompts(encoder, ["a"], ["{}"], "nothing")
