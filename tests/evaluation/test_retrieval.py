"""Recall at k on galleries small enough to count by hand."""

import itertools

import numpy as np
import pytest
import torch

from medclip_hf.evaluation.retrieval import hit_probability, retrieval_hits, retrieval_recall


def test_perfect_pairs_are_found_first():
    recall = retrieval_recall(torch.eye(4), torch.eye(4), ks=(1, 2))
    assert recall == {
        "image_to_text_recall@1": 1.0,
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": 1.0,
        "text_to_image_recall@2": 1.0,
    }


def test_a_partner_in_second_place_counts_from_two_on():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.6, 0.8], [0.8, 0.6]])  # each image is nearer to the other's text
    recall = retrieval_recall(images, texts, ks=(1, 2))
    assert recall["image_to_text_recall@1"] == 0.0
    assert recall["image_to_text_recall@2"] == 1.0


def test_both_ways_differ_where_they_should():
    images = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), dim=-1)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    recall = retrieval_recall(images, texts, ks=(1,))
    assert recall["image_to_text_recall@1"] == 0.5  # the second image is nearer to the first text
    assert recall["text_to_image_recall@1"] == 1.0


@pytest.mark.parametrize("k", [1, 3, 10])
def test_collapsed_embeddings_get_what_a_guess_gets(k):
    same = torch.ones(10, 5)
    recall = retrieval_recall(same, same, ks=(k,))
    assert recall[f"image_to_text_recall@{k}"] == pytest.approx(k / 10)


def test_repeated_captions_share_the_place():
    embeds = torch.eye(3)[[0, 0, 1, 2]]  # the first two pairs cannot be told apart
    assert retrieval_recall(embeds, embeds, ks=(1,))["image_to_text_recall@1"] == pytest.approx(0.75)


def test_the_order_of_the_rows_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 3, (30, 4), generator=generator).float() + 0.1
    texts = torch.randint(0, 3, (30, 4), generator=generator).float() + 0.1
    order = torch.randperm(30, generator=generator)
    assert retrieval_recall(images, texts) == pytest.approx(retrieval_recall(images[order], texts[order]))


def test_one_of_several_captions_is_enough():
    images = torch.eye(2)
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # the first caption of image 0 is off
    recall = retrieval_recall(images, texts, ks=(1,), text_to_image=torch.tensor([0, 0, 1]))
    assert recall["image_to_text_recall@1"] == pytest.approx((1.0 + 0.5) / 2)
    assert recall["text_to_image_recall@1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("similarity", "is_partner"), [([3, 2, 2, 2, 1], [0, 1, 0, 1, 0]), ([2, 2, 2], [0, 1, 0])])
def test_the_chance_of_a_hit_is_that_over_all_orders_of_ties(similarity, is_partner):
    for k in range(1, len(similarity) + 1):
        hits = []
        for order in itertools.permutations(range(len(similarity))):
            ranked = sorted(order, key=lambda item: -similarity[item])
            hits.append(any(is_partner[item] for item in ranked[:k]))
        chance = hit_probability(torch.tensor([similarity]).float(), torch.tensor([is_partner]).bool(), [k])
        assert chance.item() == pytest.approx(sum(hits) / len(hits))


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(23, 8, generator=generator), torch.randn(23, 8, generator=generator)
    assert retrieval_recall(images, texts, chunk_size=5) == pytest.approx(retrieval_recall(images, texts))


def test_blocks_count_what_the_whole_matrix_does_where_images_have_several_texts_and_scores_tie():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 2, (17, 6), generator=generator).float() + 0.1
    owner = torch.randint(0, 17, (40,), generator=generator)
    owner[:17] = torch.arange(17)
    texts = torch.randint(0, 2, (40, 6), generator=generator).float() + 0.1
    ks = (1, 2, 5, 30)
    similarity = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    is_partner = owner[None] == torch.arange(17)[:, None]
    hits = retrieval_hits(images, texts, ks, text_to_image=owner, chunk_size=7)
    torch.testing.assert_close(hits.image_to_text, hit_probability(similarity, is_partner, ks))
    torch.testing.assert_close(hits.text_to_image, hit_probability(similarity.T, is_partner.T, ks))


def test_recall_of_random_embeddings_is_what_numpy_s_ranks_give():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    similarity = images / np.linalg.norm(images, axis=1, keepdims=True)
    similarity = similarity @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    ranks = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    recall = retrieval_recall(torch.from_numpy(images), torch.from_numpy(texts), ks=(1, 5, 10), chunk_size=16)
    for k in (1, 5, 10):
        assert recall[f"image_to_text_recall@{k}"] == pytest.approx((ranks < k).mean())


def test_intervals_resample_queries_by_patient_and_leave_the_gallery_alone():
    hits = retrieval_hits(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=(1,))
    interval = hits.recall_with_intervals(groups=["a", "a", "b", "b"], num_resamples=200)["image_to_text_recall@1"]
    assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
    perfect = retrieval_hits(torch.eye(4), torch.eye(4), ks=(1,)).recall_with_intervals(num_resamples=50)
    assert all((figure.low, figure.high) == (1.0, 1.0) for figure in perfect.values())


def test_half_precision_is_compared_in_single():
    images = torch.eye(3)
    assert retrieval_recall(images.bfloat16(), images.bfloat16(), ks=(1,))["image_to_text_recall@1"] == 1.0


def test_a_k_beyond_the_gallery_finds_everything():
    assert retrieval_recall(torch.eye(2), torch.eye(2).flip(0), ks=(10,))["image_to_text_recall@10"] == 1.0


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        (torch.eye(2), torch.eye(3), {}, "share D"),
        (torch.eye(3)[:2], torch.eye(3), {}, "text_to_image"),
        (torch.zeros(0, 3), torch.zeros(0, 3), {}, "nothing to retrieve"),
        (torch.full((2, 2), torch.nan), torch.eye(2), {}, "not finite"),
        (torch.eye(2), torch.eye(2), {"ks": (0,)}, "at least 1"),
        (torch.eye(2), torch.eye(2), {"text_to_image": torch.tensor([0, 2])}, "there are 2"),
        (torch.eye(2), torch.eye(2), {"text_to_image": torch.tensor([0, 0])}, "1 of 2 images have no text"),
        (torch.eye(2), torch.eye(2), {"text_to_image": torch.tensor([0.0, 1.0])}, "integers"),
    ],
)
def test_galleries_that_do_not_fit_are_refused(images, texts, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(images, texts, **options)
