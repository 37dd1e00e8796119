"""ConceptCLIP's losses: reference values, plain statements of the formulas, and what must not break them."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip import loss_conceptclip
from medclip_hf.modeling.conceptclip.loss_conceptclip import (
    best_patch_similarity,
    image_text_alignment_loss,
    patch_concept_alignment_loss,
    pool_concepts,
    usable_concepts,
)

LOSS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
TINY_CHUNK_BYTES = 64  # a few similarities: every loop over chunks turns many times


@pytest.fixture(params=["one chunk", "many chunks"])
def chunking(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(loss_conceptclip, "CPU_CHUNK_BYTES", TINY_CHUNK_BYTES)


def unit_rows(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


def scalars(scale=5.0, bias=-1.0, dtype=torch.float32):
    return [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (scale, bias)]


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def assert_all_close(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def plain_best_patch(patches, concepts):
    return (patches @ concepts.T).max(dim=1).values


def plain_patch_concept_loss(patches, concepts, concept_to_image, scale, bias, ids=None):
    """The formula, pair by pair."""
    total = torch.zeros((), dtype=patches.dtype)
    for i in range(len(patches)):
        named_here = [ids[c] for c in range(len(concepts)) if ids is not None and concept_to_image[c] == i]
        for c in range(len(concepts)):
            logit = scale * max((patches[i] @ concepts[c]).unbind()) + bias
            is_own = concept_to_image[c] == i
            if not is_own and ids is not None and ids[c] in named_here:
                continue
            total = total + F.softplus(-logit if is_own else logit).sum()
    return total / max(len(concepts), 1)


# Reference values of the official code


def golden_tensors(path):
    tensors = load_file(path)
    names = ("image_features", "text_features", "image_token_features", "text_token_features")
    leaves = {name: tensors[f"in.{name}"].clone().requires_grad_() for name in names}
    for name in ("logit_scale", "concept_logit_scale"):
        leaves[f"{name}_param"] = tensors[f"in.{name}_param"].clone().requires_grad_()
    for name in ("logit_bias", "concept_logit_bias"):
        leaves[name] = tensors[f"in.{name}"].clone().requires_grad_()
    return tensors, leaves


def golden_spans(tensors):
    """Positions with [CLS] counted, and which are spans: the files store them without [CLS], padded with -1."""
    spans = tensors["in.meta_infos"] + 1
    return spans, torch.arange(spans.shape[1]) < tensors["in.span_nums"].unsqueeze(1)


def losses_of(leaves, spans, mask):
    image_text = image_text_alignment_loss(
        leaves["image_features"], leaves["text_features"], leaves["logit_scale_param"].exp(), leaves["logit_bias"]
    )
    concepts = pool_concepts(leaves["text_token_features"], spans, mask)
    usable = usable_concepts(spans, mask, leaves["text_token_features"].shape[1])
    patch_concept = patch_concept_alignment_loss(
        F.normalize(leaves["image_token_features"], dim=-1),
        concepts[usable],
        usable.nonzero()[:, 0],
        leaves["concept_logit_scale_param"].exp(),
        leaves["concept_logit_bias"],
    )
    return image_text, patch_concept, concepts


@pytest.mark.parametrize("case", ["base", "init_scale", "sparse_PATCHED"])
def test_losses_and_all_gradients_equal_the_official_ones(goldens, case, chunking):
    tensors, leaves = golden_tensors(goldens / f"conceptclip_losses_{case}_ws1.safetensors")
    spans, mask = golden_spans(tensors)
    image_text, patch_concept, concepts = losses_of(leaves, spans, mask)
    weighted = tensors["in.concept_loss_weight"] * patch_concept
    torch.testing.assert_close(concepts, tensors["mid.pooled_concepts_normalized"], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(image_text, tensors["out.contrastive_loss"], **LOSS_TOLERANCE)
    torch.testing.assert_close(weighted, tensors["out.concept_loss_weighted"], **LOSS_TOLERANCE)
    torch.testing.assert_close(image_text + weighted, tensors["out.total_loss"], **LOSS_TOLERANCE)
    for prefix, loss in (
        ("grad_contrastive", image_text),
        ("grad_concept_weighted", weighted),
        ("grad_total", image_text + weighted),
    ):
        found = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(leaves, found, strict=True):
            expected = tensors[f"{prefix}.{name}"]
            torch.testing.assert_close(gradient, expected, **GRADIENT_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_stage_1_gradients_equal_the_official_ones(goldens):
    tensors, leaves = golden_tensors(goldens / "conceptclip_losses_base_ws1.safetensors")
    names = ("image_features", "text_features", "logit_scale_param", "logit_bias")
    loss, _, _ = losses_of(leaves, *golden_spans(tensors))
    torch.testing.assert_close(loss, tensors["siglip.out.contrastive_loss"], **LOSS_TOLERANCE)
    for name, gradient in zip(names, gradients(loss, *(leaves[n] for n in names)), strict=True):
        torch.testing.assert_close(gradient, tensors[f"siglip.grad.{name}"], **GRADIENT_TOLERANCE)


def test_spans_past_the_text_are_masked_and_those_inside_equal_the_official_ones(goldens):
    tensors, leaves = golden_tensors(goldens / "conceptclip_losses_out_of_range_spans_ws1.safetensors")
    spans, mask = golden_spans(tensors)
    num_tokens = leaves["text_token_features"].shape[1]
    is_inside = mask & (spans[..., 1] <= num_tokens)
    assert (mask & ~is_inside).any()
    image_text, patch_concept, concepts = losses_of(leaves, spans, mask)
    assert (concepts[~is_inside] == 0).all()
    expected = tensors["mid.pooled_concepts_normalized"]
    torch.testing.assert_close(concepts[is_inside], expected[is_inside], **GRADIENT_TOLERANCE)
    for gradient in torch.autograd.grad(image_text + patch_concept, list(leaves.values())):
        assert gradient.isfinite().all()


def test_two_official_processes_equal_one_of_ours_once_each_normalises_by_its_own_concepts(goldens):
    """The release divides by the concepts of the process that owns them, 3 and 6 here; ours by those of all, 9."""
    tensors = load_file(goldens / "conceptclip_losses_base_ws2.safetensors")
    names = ("image_features", "text_features", "image_token_features", "text_token_features")
    merged = {f"in.{name}": torch.cat([tensors[f"rank{r}.in.{name}"] for r in (0, 1)]) for name in names}
    leaves = {name: merged[f"in.{name}"].requires_grad_() for name in names}
    scalar_names = ("logit_scale_param", "logit_bias", "concept_logit_scale_param", "concept_logit_bias")
    leaves |= {name: tensors[f"in.{name}"].clone().requires_grad_() for name in scalar_names}
    official, owners, pooled = 0.0, [], []
    patches = F.normalize(leaves["image_token_features"], dim=-1)
    scale, bias = leaves["concept_logit_scale_param"].exp(), leaves["concept_logit_bias"]
    for rank in (0, 1):
        spans, mask = golden_spans({name: tensors[f"rank{rank}.{name}"] for name in ("in.meta_infos", "in.span_nums")})
        pooled.append(pool_concepts(leaves["text_token_features"][3 * rank : 3 * rank + 3], spans, mask)[mask])
        owners.append(mask.nonzero()[:, 0] + 3 * rank)
        official = official + patch_concept_alignment_loss(patches, pooled[rank], owners[rank], scale, bias) / 2
    image_text = image_text_alignment_loss(
        leaves["image_features"], leaves["text_features"], leaves["logit_scale_param"].exp(), leaves["logit_bias"]
    )
    total = image_text + tensors["in.concept_loss_weight"] * official
    torch.testing.assert_close(total, tensors["ddp_mean.out.total_loss"], **LOSS_TOLERANCE)
    found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    for name, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(gradient, tensors[f"ddp_mean.grad_total.{name}"], **GRADIENT_TOLERANCE)

    ours = patch_concept_alignment_loss(patches, torch.cat(pooled), torch.cat(owners), scale, bias)
    own_means = [patch_concept_alignment_loss(patches, p, o, scale, bias) for p, o in zip(pooled, owners, strict=True)]
    torch.testing.assert_close(ours, (3 * own_means[0] + 6 * own_means[1]) / 9)


# Image-text alignment


def test_image_text_loss_of_two_pairs_can_be_checked_by_hand():
    images = texts = torch.eye(2)
    scale, bias = torch.tensor([2.0]), torch.tensor([-1.0])
    own, other = math.log1p(math.exp(-(2 * 1 - 1))), math.log1p(math.exp(2 * 0 - 1))
    loss = image_text_alignment_loss(images, texts, scale, bias)
    torch.testing.assert_close(loss, torch.tensor((2 * own + 2 * other) / 2))


def test_image_text_gradients_are_exact_in_float64(chunking):
    inputs = [unit_rows(3, 4, dtype=torch.float64), unit_rows(6, 4, seed=1, dtype=torch.float64)]
    inputs += scalars(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: image_text_alignment_loss(*a, first_image_index=2), inputs)


def test_image_text_losses_of_parts_of_the_images_add_up_to_that_of_all(chunking):
    images, texts, scale_bias = unit_rows(5, 4), unit_rows(5, 4, seed=1), scalars()
    parts = [
        image_text_alignment_loss(images[a:b], texts, *scale_bias, first_image_index=a)
        for a, b in ((0, 2), (2, 2), (2, 5))
    ]
    whole = image_text_alignment_loss(images, texts, *scale_bias)
    torch.testing.assert_close(sum(parts), whole)
    inputs = (images, texts, *scale_bias)
    assert_all_close(gradients(sum(parts), *inputs), gradients(whole, *inputs))


def test_image_text_loss_without_images_is_zero_and_has_zero_gradients():
    inputs = (torch.zeros(0, 4, requires_grad=True), unit_rows(3, 4), *scalars())
    loss = image_text_alignment_loss(*inputs)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, *inputs))
    nothing = torch.zeros(0, 4)
    assert image_text_alignment_loss(nothing, nothing, *scalars()) == 0


def test_image_text_loss_under_autocast_is_that_of_float32():
    inputs = (unit_rows(6, 32), unit_rows(6, 32, seed=1), *scalars(scale=50.0))
    plain = image_text_alignment_loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = image_text_alignment_loss(*inputs)
    assert loss.dtype == torch.float32
    assert loss == plain
    assert_all_close(gradients(loss, *inputs), gradients(plain, *inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_images", "num_texts", "width", "first", "message"),
    [(3, 2, 4, 0, "captions"), (2, 3, 4, 2, "captions"), (2, 2, 5, 0, "wide"), (2, 2, 4, -1, "captions")],
)
def test_image_text_loss_refuses_what_does_not_fit(num_images, num_texts, width, first, message):
    with pytest.raises(ValueError, match=message):
        image_text_alignment_loss(
            torch.zeros(num_images, 4), torch.zeros(num_texts, width), *scalars(), first_image_index=first
        )


# Concept pooling


def test_a_concept_is_the_normalised_mean_of_its_tokens():
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [5.0, 8.0], [9.0, 9.0]]])
    concepts = pool_concepts(tokens, torch.tensor([[[1, 3], [2, 3]]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(concepts[0, 0], torch.tensor([3.0, 4.0]) / 5)
    torch.testing.assert_close(concepts[0, 1], torch.tensor([5.0, 8.0]) / math.sqrt(89))


@pytest.mark.parametrize("span", [(2, 2), (3, 1), (-1, 2), (3, 6), (6, 7), (-1, -1)])
def test_an_empty_or_stray_span_counts_as_masked(span):
    tokens = unit_rows(1, 5, 3)
    spans, mask = torch.tensor([[span, (1, 3)]]), torch.tensor([[True, True]])
    concepts = pool_concepts(tokens, spans, mask)
    assert usable_concepts(spans, mask, 5).tolist() == [[False, True]]
    assert (concepts[0, 0] == 0).all()
    (gradient,) = gradients(concepts.sum(), tokens)
    assert gradient.isfinite().all()
    assert (gradient[0, 3:] == 0).all()


def test_pooling_has_exact_gradients_and_none_where_masked():
    tokens = unit_rows(2, 5, 3, dtype=torch.float64)
    spans = torch.tensor([[[1, 3], [2, 5]], [[0, 1], [3, 3]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert torch.autograd.gradcheck(lambda t: pool_concepts(t, spans, mask), tokens)
    (gradient,) = gradients(pool_concepts(tokens, spans, mask)[:, 1].sum(), tokens)
    assert (gradient == 0).all()


def test_pooling_is_in_float32_for_bfloat16_tokens_and_under_autocast():
    tokens = unit_rows(1, 40, 8).detach()
    spans, mask = torch.tensor([[[3, 37]]]), torch.ones(1, 1, dtype=torch.bool)
    exact = pool_concepts(tokens, spans, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool_concepts(tokens, spans, mask), exact)
    rounded = tokens.bfloat16()
    assert torch.equal(pool_concepts(rounded, spans, mask), pool_concepts(rounded.float(), spans, mask))


def test_a_text_without_concepts_and_a_batch_without_columns_give_nothing():
    spans = torch.full((2, 1, 2), -1)
    assert (pool_concepts(torch.ones(2, 4, 3), spans, torch.zeros(2, 1, dtype=torch.bool)) == 0).all()
    none = pool_concepts(torch.ones(2, 4, 3), spans[:, :0], torch.zeros(2, 0, dtype=torch.bool))
    assert none.shape == (2, 0, 3)


def test_pooling_refuses_shapes_that_do_not_fit():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="concept_mask should be"):
        pool_concepts(torch.ones(1, 4, 3), torch.zeros(1, 1, 2, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match="concept_token_spans should be"):
        pool_concepts(torch.ones(1, 4, 3), torch.zeros(1, 2, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match="token_embeds should be"):
        pool_concepts(torch.ones(4, 3), torch.zeros(1, 2, 2, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match="2 texts in token_embeds"):
        pool_concepts(torch.ones(2, 4, 3), torch.zeros(1, 2, 2, dtype=torch.int64), mask)


# Best patch


def test_best_patch_equals_the_plain_maximum_and_its_gradients(chunking):
    patches, concepts = unit_rows(3, 7, 8), unit_rows(11, 8, seed=1)
    values, indices = best_patch_similarity(patches, concepts)
    plain = plain_best_patch(patches, concepts)
    weights = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(values, plain)
    assert torch.equal(indices, (patches @ concepts.T).argmax(dim=1))
    assert_all_close(
        gradients((values * weights).sum(), patches, concepts), gradients((plain * weights).sum(), patches, concepts)
    )


def test_best_patch_gradients_are_exact_in_float64(chunking):
    inputs = (unit_rows(3, 5, 4, dtype=torch.float64), unit_rows(6, 4, seed=1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *a: best_patch_similarity(*a)[0], inputs)


def test_only_the_best_patch_has_a_gradient():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    concepts = torch.tensor([[0.6, 0.8]], requires_grad=True)
    values, indices = best_patch_similarity(patches, concepts)
    assert indices.tolist() == [[1]]
    grad_patches, grad_concepts = gradients(values.sum(), patches, concepts)
    torch.testing.assert_close(grad_patches, torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]))
    torch.testing.assert_close(grad_concepts, torch.tensor([[0.0, 1.0]]))


def test_of_equal_patches_one_alone_has_the_whole_gradient(chunking):
    patches = unit_rows(2, 1, 8).detach().expand(2, 5, 8).clone().requires_grad_()
    concepts = unit_rows(3, 8, seed=1)
    values, best = best_patch_similarity(patches, concepts)
    (gradient,) = gradients(values[:, 0].sum(), patches)
    for image in range(2):
        assert gradient[image].any(dim=-1).nonzero().flatten().tolist() == [best[image, 0]]
        torch.testing.assert_close(gradient[image, best[image, 0]], concepts[0].detach())


def test_under_autocast_the_similarity_of_the_chosen_patch_is_exact(chunking):
    patches, concepts = unit_rows(2, 9, 32), unit_rows(5, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = best_patch_similarity(patches, concepts)
    similarity = patches @ concepts.T
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, similarity.gather(1, indices.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(values, similarity.amax(dim=1), rtol=0, atol=1e-2)
    assert all(g.isfinite().all() for g in gradients(values.sum(), patches, concepts))


def test_bfloat16_patches_keep_float32_similarities_and_get_bfloat16_gradients():
    patches, concepts = (unit_rows(2, 9, 32), unit_rows(5, 32, seed=1))
    low = [t.detach().bfloat16().requires_grad_() for t in (patches, concepts)]
    values, _ = best_patch_similarity(*low)
    found = gradients(values.sum(), *low)
    exact = [t.detach().float().requires_grad_() for t in low]
    exact_values = plain_best_patch(*exact)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact_values, rtol=0, atol=1e-2)
    assert [g.dtype for g in found] == [torch.bfloat16] * 2


@pytest.mark.parametrize(("num_images", "num_concepts"), [(3, 0), (0, 4), (0, 0)])
def test_without_images_or_concepts_everything_is_zero_and_finite(num_images, num_concepts):
    patches, concepts = unit_rows(num_images, 5, 4), unit_rows(num_concepts, 4, seed=1)
    inputs = (patches, concepts, *scalars())
    owners = torch.zeros(num_concepts, dtype=torch.int64)
    assert best_patch_similarity(patches, concepts)[0].shape == (num_images, num_concepts)
    loss = patch_concept_alignment_loss(patches, concepts, owners, *inputs[2:], concept_ids=owners)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, *inputs))


def test_best_patch_refuses_images_without_patches_and_other_widths():
    with pytest.raises(ValueError, match="at least one patch"):
        best_patch_similarity(torch.zeros(2, 0, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="5 wide"):
        best_patch_similarity(torch.zeros(2, 3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="concept_embeds should be"):
        best_patch_similarity(torch.zeros(2, 3, 4), torch.zeros(3, 2, 4))


# Patch-concept alignment


OWNERS = [0, 0, 1, 3, 3, 3]  # image 2 has no concept
IDS = [7, 8, 7, 9, 9, 8]  # 7 in captions 0 and 1; 8 in 0 and 3; 9 twice in 3


@pytest.mark.parametrize("ids", [None, IDS])
def test_patch_concept_loss_equals_the_formula_pair_by_pair(ids, chunking):
    inputs = (unit_rows(4, 5, 8), unit_rows(6, 8, seed=1), *scalars())
    loss = patch_concept_alignment_loss(
        *inputs[:2], torch.tensor(OWNERS), *inputs[2:], concept_ids=None if ids is None else torch.tensor(ids)
    )
    plain = plain_patch_concept_loss(inputs[0], inputs[1], OWNERS, *inputs[2:], ids=ids)
    torch.testing.assert_close(loss, plain)
    assert_all_close(gradients(loss, *inputs), gradients(plain, *inputs))


@pytest.mark.parametrize("ids", [None, IDS])
def test_patch_concept_losses_of_parts_of_the_images_add_up_to_that_of_all(ids):
    patches, concepts, scale_bias = unit_rows(4, 5, 8), unit_rows(6, 8, seed=1), scalars()
    ids = None if ids is None else torch.tensor(ids)

    def part(start, stop):
        return patch_concept_alignment_loss(
            patches[start:stop],
            concepts,
            torch.tensor(OWNERS),
            *scale_bias,
            first_image_index=start,
            concept_ids=ids,
        )

    total, whole = part(0, 1) + part(1, 1) + part(1, 4), part(0, 4)
    torch.testing.assert_close(total, whole)
    inputs = (patches, concepts, *scale_bias)
    assert_all_close(gradients(total, *inputs), gradients(whole, *inputs))


def test_the_same_concept_of_another_caption_is_no_negative_and_has_no_gradient():
    patches, concepts = unit_rows(2, 3, 4), unit_rows(2, 4, seed=1)
    owners, same, different = torch.tensor([0, 1]), torch.tensor([5, 5]), torch.tensor([5, 6])
    scale, bias = scalars()
    with_pairs = patch_concept_alignment_loss(patches, concepts, owners, scale, bias)
    assert with_pairs == patch_concept_alignment_loss(patches, concepts, owners, scale, bias, concept_ids=different)
    own_only = patch_concept_alignment_loss(patches, concepts, owners, scale, bias, concept_ids=same)
    own_logits = scale * plain_best_patch(patches, concepts).diagonal() + bias
    torch.testing.assert_close(own_only, F.softplus(-own_logits).sum() / 2)


def test_a_concept_named_twice_in_one_caption_is_two_positives_of_its_image():
    patches, concept = unit_rows(2, 3, 4), unit_rows(1, 4, seed=1)
    twice = concept.expand(2, -1)
    scale, bias = scalars()
    loss = patch_concept_alignment_loss(
        patches, twice, torch.tensor([0, 0]), scale, bias, concept_ids=torch.tensor([5, 5])
    )
    torch.testing.assert_close(loss, patch_concept_alignment_loss(patches, concept, torch.tensor([0]), scale, bias))


def test_patch_concept_loss_refuses_labels_of_another_length():
    arguments = (torch.zeros(2, 3, 4), torch.zeros(3, 4))
    two, three, four = (torch.zeros(count, dtype=torch.int64) for count in (2, 3, 4))
    with pytest.raises(ValueError, match="concept_to_image should be"):
        patch_concept_alignment_loss(*arguments, two, *scalars())
    with pytest.raises(ValueError, match="concept_ids should be"):
        patch_concept_alignment_loss(*arguments, three, *scalars(), concept_ids=four)


def test_patch_concept_loss_is_the_same_every_time():
    inputs = (unit_rows(4, 50, 16), unit_rows(60, 16, seed=1), *scalars())
    owners = torch.arange(60) % 4
    runs = []
    for _ in range(3):
        loss = patch_concept_alignment_loss(*inputs[:2], owners, *inputs[2:], concept_ids=torch.arange(60) % 7)
        runs.append((loss, *gradients(loss, *inputs)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_both_losses_compile_without_a_graph_break():
    patches, concepts, images, texts = unit_rows(2, 5, 8), unit_rows(3, 8), unit_rows(2, 8), unit_rows(2, 8, seed=1)
    scale, bias = scalars()
    owners = torch.tensor([0, 1, 1])

    def loss_of(patches, concepts, images, texts, scale, bias):
        patch_concept = patch_concept_alignment_loss(patches, concepts, owners, scale, bias, concept_ids=owners)
        return image_text_alignment_loss(images, texts, scale, bias) + patch_concept

    inputs = (patches, concepts, images, texts, scale, bias)
    compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), loss_of(*inputs))
    assert_all_close(gradients(compiled(*inputs), *inputs), gradients(loss_of(*inputs), *inputs))


def test_padding_among_the_concepts_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    patches = F.normalize(torch.randn(3, 5, 8, generator=generator), dim=-1)
    concepts = F.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    owners, ids = torch.tensor([0, 0, 2, 1]), torch.tensor([7, 8, 7, 9])
    scale, bias = torch.tensor([5.0]), torch.tensor([-1.0])
    is_padding = torch.tensor([False, True, False, True])
    padded = patch_concept_alignment_loss(
        patches, concepts, owners.masked_fill(is_padding, -1), scale, bias, concept_ids=ids
    )
    kept = ~is_padding
    expected = patch_concept_alignment_loss(patches, concepts[kept], owners[kept], scale, bias, concept_ids=ids[kept])
    torch.testing.assert_close(padded, expected)
