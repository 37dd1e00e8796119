"""fVLM's loss: every anatomy of a scan is matched with its own text, and known false negatives are no negatives.

Shapes: B scans, A anatomies, D the width of the shared space. All functions are pure, work on all anatomies at once,
never wait for the device, and return finite values and gradients when an anatomy has no pair at all.
"""

import torch
from torch import Tensor


def positive_pairs(text_ids: Tensor, is_abnormal: Tensor, is_used: Tensor) -> Tensor:
    """Which text is a right answer for which scan: (A, B, B) bool, row a scan, column the scan that a text belongs to.

    A pair is positive if it is one scan, if the anatomy is normal in both scans, or if both texts are identical.

    Args:
        text_ids: (B, A) int64, equal exactly where the texts are equal.
        is_abnormal: (B, A) bool, the report describes something abnormal.
        is_used: (B, A) bool, the anatomy is completely inside the crop and has a text; the others give False.
    """
    ids, abnormal, used = text_ids.T, is_abnormal.T, is_used.T  # (A, B)
    is_same_text = ids[:, :, None] == ids[:, None, :]
    is_both_normal = ~(abnormal[:, :, None] | abnormal[:, None, :])
    is_same_scan = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    return (is_same_scan | is_both_normal | is_same_text) & used[:, :, None] & used[:, None, :]


def trained_anatomies(pairs: Tensor, is_abnormal: Tensor, is_used: Tensor) -> Tensor:
    """Which anatomies have something to learn from this batch: (A,) bool.

    An anatomy trains if at least one used scan is abnormal there and at least one used pair is a negative: with
    normal scans alone, or with positives alone, every target is the same.

    Args:
        pairs: (A, B, B) bool, from `positive_pairs`.
        is_abnormal: (B, A) bool.
        is_used: (B, A) bool.
    """
    used = is_used.T
    has_negative = (~pairs & used[:, :, None] & used[:, None, :]).flatten(1).any(dim=1)
    return (is_used & is_abnormal).any(dim=0) & has_negative


def normalize_rows(weights: Tensor) -> Tensor:
    """Rows that sum to one; a row of zeros stays zero. Any shape, float."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def anatomy_logits(anatomy_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosine of every scan with the text of every scan, for each anatomy: (A, B, B), float32 or more.

    Args:
        anatomy_embeds: (B, A, D), L2-normalised.
        text_embeds: (B, A, D), L2-normalised, the text of that anatomy of that scan.
        logit_scale: scalar or (1,), exponentiated: one over the temperature.
    """
    dtype = torch.promote_types(anatomy_embeds.dtype, torch.float32)
    images, texts = anatomy_embeds.transpose(0, 1).to(dtype), text_embeds.transpose(0, 1).to(dtype)
    # Autocast would round the product to half precision, and a scale of 100 makes that visible.
    with torch.autocast(images.device.type, enabled=False):
        return torch.matmul(images, texts.transpose(1, 2)) * logit_scale.to(dtype)


def _masked_log_softmax(logits: Tensor, is_used: Tensor) -> Tensor:
    """Log-softmax over the columns in use; rows without any column stay finite. (A, B, B) and (A, B) -> (A, B, B)."""
    return logits.masked_fill(~is_used[:, None, :], torch.finfo(logits.dtype).min).log_softmax(dim=-1)


def soft_text_targets(
    pairs: Tensor,
    teacher_text_embeds: Tensor,
    logit_scale: Tensor,
    is_abnormal: Tensor,
    is_used: Tensor,
) -> Tensor:
    """Targets in which abnormal scans share weight by how alike their texts are to a teacher: (A, B, B), rows sum to 1.

    Y_ij = 1 for positive pairs, plus softmax_j(scale <t_i, t_j>) for different scans that are both abnormal; then rows
    are normalised. The teacher is a moving average (momentum 0.995) of the text tower. Source: the abnormal part of
    the loss in RADAR's public code, by fVLM's group; fVLM's release leaves the abnormal part out.

    Args:
        pairs: (A, B, B) bool, from `positive_pairs`.
        teacher_text_embeds: (B, A, D), L2-normalised texts of the moving average; no gradient flows into them.
        logit_scale: scalar or (1,), exponentiated.
        is_abnormal: (B, A) bool.
        is_used: (B, A) bool.
    """
    with torch.no_grad():
        used, abnormal = is_used.T, (is_abnormal & is_used).T
        logits = anatomy_logits(teacher_text_embeds, teacher_text_embeds, logit_scale)
        similarity = _masked_log_softmax(logits, used).exp()
        is_same_scan = torch.eye(used.shape[1], dtype=torch.bool, device=used.device)
        is_abnormal_pair = abnormal[:, :, None] & abnormal[:, None, :] & ~is_same_scan
        return normalize_rows(pairs.to(logits.dtype) + similarity * is_abnormal_pair)


def calibrate_targets(
    targets: Tensor,
    peer_logits: Tensor,
    is_abnormal: Tensor,
    is_used: Tensor,
    *,
    peer_weight: float,
) -> Tensor:
    """Targets whose abnormal rows are mixed with what a peer model answers: (A, B, B), rows sum to 1.

    y'_i = (1 - w) y_i + w softmax_j(S_peer,ij) for abnormal rows i; the paper's co-teaching with w = 1 - alpha = 0.5
    after a ramp from 0. Call it with the peer's logits for image to text and with their transpose for text to image.

    Args:
        targets: (A, B, B), rows sum to 1.
        peer_logits: (A, B, B) from `anatomy_logits` with the peer's embeddings; no gradient flows into them.
        is_abnormal: (B, A) bool.
        is_used: (B, A) bool.
        peer_weight: w in [0, 1].

    Raises:
        ValueError: `peer_weight` lies outside [0, 1].
    """
    if not 0.0 <= peer_weight <= 1.0:
        raise ValueError(f"peer_weight is a share in [0, 1], but {peer_weight} came.")
    with torch.no_grad():
        answers = _masked_log_softmax(peer_logits, is_used.T).exp()
        is_calibrated = (is_abnormal & is_used).T[:, :, None]
        return torch.where(is_calibrated, torch.lerp(targets, answers.to(targets.dtype), peer_weight), targets)


def soft_cross_entropy(logits: Tensor, targets: Tensor, is_used: Tensor) -> Tensor:
    """Cross-entropy of soft targets for each anatomy, averaged over its used rows: (A,).

    L_a = 1/n_a sum_i sum_j -Y_ij log softmax_j(S_ij), over the n_a scans in use.

    Args:
        logits: (A, B, B).
        targets: (A, B, B), zero outside used rows and columns.
        is_used: (B, A) bool.
    """
    used = is_used.T
    log_probabilities = _masked_log_softmax(logits, used).masked_fill(~used[:, None, :], 0.0)
    row_losses = -(targets * log_probabilities).sum(dim=-1).masked_fill(~used, 0.0)
    return row_losses.sum(dim=-1) / used.sum(dim=-1).clamp(min=1)


def anatomy_alignment_loss(
    anatomy_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    text_ids: Tensor,
    is_abnormal: Tensor,
    is_used: Tensor,
    teacher_text_embeds: Tensor | None = None,
    peer_logits: Tensor | None = None,
    peer_weight: float = 0.0,
) -> Tensor:
    """Disease-aware contrastive loss of each anatomy, (A,) in float32 or more; the loss of a batch is its sum.

    Both directions use the same hard targets (`positive_pairs`, row-normalised). Anatomies with nothing to learn
    (`trained_anatomies`) give exactly zero. Feed the rows of all processes: the loss of a global batch is not a mean
    of losses of its parts.

    Args:
        anatomy_embeds: (B, A, D), L2-normalised.
        text_embeds: (B, A, D), L2-normalised; rows of scans without a text are ignored.
        logit_scale: scalar or (1,), exponentiated.
        text_ids: (B, A) int64, equal exactly where the texts are equal.
        is_abnormal: (B, A) bool.
        is_used: (B, A) bool, the anatomy is completely inside the crop and has a text.
        teacher_text_embeds: (B, A, D) of a moving average of the text tower: see `soft_text_targets`.
        peer_logits: (A, B, B) of another model on the same batch: see `calibrate_targets`.
        peer_weight: weight of the peer's answers.
    """
    pairs = positive_pairs(text_ids, is_abnormal, is_used)
    is_trained = trained_anatomies(pairs, is_abnormal, is_used)
    logits = anatomy_logits(anatomy_embeds, text_embeds, logit_scale)
    logits_per_text = logits.transpose(1, 2)

    if teacher_text_embeds is None:
        targets = normalize_rows(pairs.to(logits.dtype))
    else:
        targets = soft_text_targets(pairs, teacher_text_embeds, logit_scale.detach(), is_abnormal, is_used)
    image_targets = text_targets = targets
    if peer_logits is not None:
        image_targets = calibrate_targets(targets, peer_logits, is_abnormal, is_used, peer_weight=peer_weight)
        peer_logits_per_text = peer_logits.transpose(1, 2)
        text_targets = calibrate_targets(targets, peer_logits_per_text, is_abnormal, is_used, peer_weight=peer_weight)

    image_to_text = soft_cross_entropy(logits, image_targets, is_used)
    text_to_image = soft_cross_entropy(logits_per_text, text_targets, is_used)
    return torch.where(is_trained, (image_to_text + text_to_image) / 2, 0.0)
