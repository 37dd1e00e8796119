"""fVLM's loss: against a plain double loop, at its edges, and in its gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from medclip_hf.modeling.fvlm.loss_fvlm import (
    anatomy_alignment_loss,
    anatomy_logits,
    calibrate_targets,
    normalize_rows,
    positive_pairs,
    soft_text_targets,
    trained_anatomies,
)

B, A, D = 5, 3, 8


@pytest.fixture
def batch():
    """A batch in which anatomy 2 has normal scans alone, and a few anatomies are cut off."""
    generator = torch.Generator().manual_seed(0)
    is_abnormal = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    is_used = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    text_ids = torch.tensor([[10, 20, 30], [11, 21, 31], [10, 22, 32], [13, 23, 33], [14, 24, 34]])
    image = F.normalize(torch.randn(B, A, D, generator=generator), dim=-1)
    text = F.normalize(torch.randn(B, A, D, generator=generator), dim=-1)
    return {"image": image, "text": text, "text_ids": text_ids, "is_abnormal": is_abnormal, "is_used": is_used}


def loss_by_loops(image, text, scale, text_ids, is_abnormal, is_used):
    """The formulas of the facts, scan by scan."""
    losses = []
    for a in range(image.shape[1]):
        scans = [i for i in range(len(image)) if is_used[i, a]]
        if not any(is_abnormal[i, a] for i in scans):
            losses.append(0.0)
            continue
        targets = [
            [
                float(
                    i == j
                    or (not is_abnormal[i, a] and not is_abnormal[j, a])
                    or bool(text_ids[i, a] == text_ids[j, a])
                )
                for j in scans
            ]
            for i in scans
        ]
        if all(value == 1.0 for row in targets for value in row):
            losses.append(0.0)
            continue
        logits = [[float(image[i, a] @ text[j, a]) * scale for j in scans] for i in scans]
        total = 0.0
        for matrix in (logits, list(zip(*logits, strict=True))):
            for row, target in zip(matrix, targets, strict=True):
                log_sum = math.log(sum(math.exp(value) for value in row))
                total -= sum(y / sum(target) * (s - log_sum) for s, y in zip(row, target, strict=True)) / len(scans)
        losses.append(total / 2)
    return losses


def test_the_loss_equals_the_formula_written_as_loops(batch):
    image, text = batch.pop("image"), batch.pop("text")
    losses = anatomy_alignment_loss(image, text, torch.tensor([5.0]), **batch)
    torch.testing.assert_close(losses, torch.tensor(loss_by_loops(image, text, 5.0, **batch)), rtol=1e-5, atol=1e-6)
    assert losses[2] == 0  # normal scans alone


def test_pairs_are_positive_for_one_scan_two_normals_or_equal_texts():
    text_ids = torch.tensor([[1], [2], [1], [4]])
    is_abnormal = torch.tensor([[True], [False], [True], [False]])
    pairs = positive_pairs(text_ids, is_abnormal, torch.ones(4, 1, dtype=torch.bool))
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(pairs[0], expected)


@pytest.mark.parametrize(
    ("is_abnormal", "is_used", "text_ids", "trains"),
    [
        ([1, 0], [1, 1], [1, 2], True),
        ([0, 0], [1, 1], [1, 2], False),  # all normal
        ([1, 0], [0, 1], [1, 2], False),  # the abnormal scan is cut off
        ([1, 1], [1, 1], [1, 1], False),  # one text: nothing to tell apart
        ([1, 0], [1, 0], [1, 2], False),  # a single scan
    ],
)
def test_an_anatomy_trains_only_with_an_abnormal_scan_and_a_negative(is_abnormal, is_used, text_ids, trains):
    abnormal, used = (torch.tensor(flags).bool()[:, None] for flags in (is_abnormal, is_used))
    pairs = positive_pairs(torch.tensor(text_ids)[:, None], abnormal, used)
    assert trained_anatomies(pairs, abnormal, used).tolist() == [trains]


def test_what_is_not_used_changes_neither_loss_nor_gradient(batch):
    image, text = batch.pop("image").requires_grad_(), batch.pop("text")
    unused = ~batch["is_used"]
    anatomy_alignment_loss(image, text, torch.tensor(5.0), **batch).sum().backward()
    disturbed = image.detach().clone()
    disturbed[unused] = 100.0
    disturbed.requires_grad_()
    anatomy_alignment_loss(disturbed, text, torch.tensor(5.0), **batch).sum().backward()
    torch.testing.assert_close(disturbed.grad, image.grad)
    assert image.grad[unused].abs().max() == 0


@pytest.mark.parametrize("num_scans", [0, 1, 3])
def test_nothing_to_train_gives_a_zero_loss_with_zero_gradients(num_scans):
    image = torch.zeros(num_scans, A, D, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    losses = anatomy_alignment_loss(
        image,
        torch.zeros(num_scans, A, D),
        scale,
        text_ids=torch.zeros(num_scans, A, dtype=torch.long),
        is_abnormal=torch.zeros(num_scans, A, dtype=torch.bool),
        is_used=torch.zeros(num_scans, A, dtype=torch.bool),
    )
    losses.sum().backward()
    assert losses.tolist() == [0.0] * A
    assert scale.grad.tolist() == [0.0]
    assert torch.isfinite(image.grad).all()


def test_gradients_match_finite_differences(batch):
    image, text = batch.pop("image").double().requires_grad_(), batch.pop("text").double().requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(image, text, scale):
        return anatomy_alignment_loss(image, text, scale, **batch)

    assert torch.autograd.gradcheck(loss, (image, text, scale))


def test_the_loss_is_float32_for_half_precision_embeddings(batch):
    image, text = batch.pop("image").bfloat16(), batch.pop("text").bfloat16()
    losses = anatomy_alignment_loss(image, text, torch.tensor(5.0), **batch)
    assert losses.dtype == torch.float32


def test_calibration_mixes_abnormal_rows_alone_and_keeps_rows_that_sum_to_one(batch):
    used, abnormal = batch["is_used"], batch["is_abnormal"]
    targets = normalize_rows(positive_pairs(batch["text_ids"], abnormal, used).float())
    peer = anatomy_logits(batch["image"], batch["text"], torch.tensor(5.0))
    mixed = calibrate_targets(targets, peer, abnormal, used, peer_weight=0.5)
    for a in range(A):
        scans = used[:, a].nonzero()[:, 0]
        for i in range(B):
            if used[i, a] and abnormal[i, a]:
                answer = torch.zeros(B).index_put((scans,), peer[a, i, scans].softmax(0))
                torch.testing.assert_close(mixed[a, i], 0.5 * targets[a, i] + 0.5 * answer)
            else:
                assert torch.equal(mixed[a, i], targets[a, i])
    torch.testing.assert_close(mixed.sum(-1), used.T.float())


def test_a_peer_of_weight_zero_changes_nothing(batch):
    image, text = batch.pop("image"), batch.pop("text")
    peer = torch.randn(A, B, B)
    plain = anatomy_alignment_loss(image, text, torch.tensor(5.0), **batch)
    ramped = anatomy_alignment_loss(image, text, torch.tensor(5.0), peer_logits=peer, peer_weight=0.0, **batch)
    assert torch.equal(plain, ramped)


def test_a_peer_weight_that_is_no_share_is_refused(batch):
    with pytest.raises(ValueError, match=r"share in \[0, 1\], but 1.5 came"):
        calibrate_targets(
            torch.zeros(A, B, B), torch.zeros(A, B, B), batch["is_abnormal"], batch["is_used"], peer_weight=1.5
        )


def test_soft_text_targets_share_weight_among_abnormal_scans_by_their_texts(batch):
    used, abnormal = batch["is_used"], batch["is_abnormal"]
    pairs = positive_pairs(batch["text_ids"], abnormal, used)
    targets = soft_text_targets(pairs, batch["text"], torch.tensor(4.0), abnormal, used)
    torch.testing.assert_close(targets.sum(-1), used.T.float())
    for a in range(A):
        scans = used[:, a].nonzero()[:, 0].tolist()
        for i in scans:
            similarity = torch.tensor([4.0 * float(batch["text"][i, a] @ batch["text"][j, a]) for j in scans]).softmax(
                0
            )
            row = [
                float(pairs[a, i, j]) + (float(s) if i != j and abnormal[i, a] and abnormal[j, a] else 0.0)
                for j, s in zip(scans, similarity, strict=True)
            ]
            torch.testing.assert_close(targets[a, i, scans], torch.tensor(row) / sum(row))


def test_soft_targets_pass_no_gradient_to_the_teacher(batch):
    image, text = batch.pop("image").requires_grad_(), batch.pop("text")
    teacher = text.clone().requires_grad_()
    peer = torch.randn(A, B, B, requires_grad=True)
    losses = anatomy_alignment_loss(
        image, text, torch.tensor(5.0), teacher_text_embeds=teacher, peer_logits=peer, peer_weight=0.5, **batch
    )
    losses.sum().backward()
    assert teacher.grad is None
    assert peer.grad is None
    assert image.grad.abs().max() > 0
