"""Recall at k between images and texts, both ways, ties in random order."""

# `evaluate` reads the imports of this file line by line and wants one package each.
import datasets
import evaluate
import numpy
import torch

from medclip_hf.evaluation.retrieval import retrieval_recall

_DESCRIPTION = """
Recall at k between images and texts, image to text and text to image. Equal scores count as if put in random order, so
embeddings that have collapsed to one point get k / N. An image with several texts needs one of them.
"""
_INPUTS = """
Args:
    predictions: for each text the embedding of its image; need not be normalised.
    references: the embedding of the text.
    image_ids: for each text the name of its image; texts that share it are one image's. Default: all differ.
    ks: cut-offs; default 1, 5, 10.
Returns:
    image_to_text_recall@k and text_to_image_recall@k.
"""


class RetrievalRecall(evaluate.Metric):
    """Recall at k between images and texts."""

    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": embedding, "references": embedding}),
        )

    def _compute(self, predictions, references, image_ids=None, ks=(1, 5, 10)):  # type: ignore[no-untyped-def]
        images, texts = (torch.from_numpy(numpy.asarray(table, numpy.float32)) for table in (predictions, references))
        if image_ids is None:
            return retrieval_recall(images, texts, ks)
        if len(image_ids) != len(texts):
            raise ValueError(f"expected one image id a text, {len(texts)}, got {len(image_ids)}")
        _, first, owner = numpy.unique(numpy.asarray(image_ids), return_index=True, return_inverse=True)
        return retrieval_recall(images[torch.from_numpy(first)], texts, ks, text_to_image=torch.from_numpy(owner))
