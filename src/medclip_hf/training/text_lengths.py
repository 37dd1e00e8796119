"""Texts of a batch by their lengths, so that short ones are not computed as if they were long."""

from medclip_hf.training.gradients import Batch

_TOKENS_PER_BUCKET = 8  # texts are padded to a multiple: fewer shapes to compile, and what tensor cores like


def without_padding(batch: Batch) -> Batch:
    """The same texts, padded to a multiple of a few tokens beyond the longest of them; `text_lengths` says its length.

    The lengths are numbers of the host: reading them from a mask on the device would stop it.
    """
    lengths = batch.get("text_lengths")
    if not lengths:
        return batch
    longest = -(-max(lengths) // _TOKENS_PER_BUCKET) * _TOKENS_PER_BUCKET
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: values[:, :longest] if name in names else values for name, values in batch.items()}
