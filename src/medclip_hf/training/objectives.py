"""What a model is trained for: run it, gather across processes, call its losses, return named scalars.

An objective has three methods, and the loop knows nothing else about the model:

    split(batch, num_chunks)    micro-batches of a batch
    embed(model, batch)         one forward pass; its entries can be concatenated over micro-batches along axis 0
    compare(embeddings, batch)  the losses of the whole batch against those of the other processes

so that `compare(embed(model, batch), batch)["loss"].backward()` is a step, and embedding micro-batch by micro-batch
before one `compare` gives the same gradients, which adding up the losses of micro-batches would not.

`compare(...)["loss"]` is this process's share of the global loss times the number of processes: the mean over processes
of its gradients, which is what DistributedDataParallel applies, is the gradient of one process with the global batch.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from medclip_hf.modeling.conceptclip.loss_conceptclip import (
    image_text_alignment_loss,
    patch_concept_alignment_loss,
    usable_concepts,
)
from medclip_hf.training.distributed import (
    gather_counts,
    gather_rows,
    num_processes,
    process_index,
    sum_over_processes,
)

Batch = Mapping[str, Any]


class ConceptCLIPObjective:
    """Image-text alignment of the global batch, and patch-concept alignment where the model has it.

    Args:
        patch_concept_loss_weight: weight of PC-Align beside IT-Align; 0.5 as published. A model without patch-concept
            alignment (stage 1) is trained by IT-Align alone.
        use_concept_identity: whether a concept is no negative of an image whose own caption names the same one. The
            release counts it as one.
    """

    model_inputs = (
        "input_ids",
        "pixel_values",
        "attention_mask",
        "token_type_ids",
        "concept_token_spans",
        "concept_mask",
    )
    embedding_names = (
        "image_embeds",
        "text_embeds",
        "logit_scale",
        "logit_bias",
        "patch_embeds",
        "concept_embeds",
        "concept_logit_scale",
        "concept_logit_bias",
    )

    def __init__(self, patch_concept_loss_weight: float = 0.5, use_concept_identity: bool = True) -> None:
        self.patch_concept_loss_weight = patch_concept_loss_weight
        self.use_concept_identity = use_concept_identity

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """At most `num_chunks` micro-batches of nearly equal size; at least one, none empty unless the batch is.

        They hold what belongs to their rows; `set_aside`, which belongs to no row, stays with the batch.
        """
        if num_chunks < 1:
            raise ValueError(f"num_chunks should be at least 1, got {num_chunks}.")
        num_rows = len(batch["input_ids"])
        num_chunks = min(num_chunks, max(num_rows, 1))
        bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
        by_row = {name: values for name, values in batch.items() if name != "set_aside"}
        return [{name: values[start:stop] for name, values in by_row.items()} for start, stop in pairwise(bounds)]

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The model's embeddings of the batch, with its scales and biases as they are now.

        A batch without rows gives embeddings without rows that still depend on every parameter.
        """
        if len(batch["input_ids"]) == 0:
            embeddings = self.embed(model, _one_empty_row(batch))
            return {name: value if "logit" in name else value[:0] for name, value in embeddings.items()}
        inputs = {name: batch[name] for name in self.model_inputs if name in batch}
        outputs = model(**inputs, return_loss=False, return_logits=False)
        return {name: outputs[name] for name in self.embedding_names if outputs.get(name) is not None}

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global values for the log, detached and equal on all processes.

        Args:
            embeddings: of the whole batch, as `embed` gives them, concatenated over micro-batches. Scales and biases
                may have come k times and count by their mean.
            batch: what was embedded.

        Raises:
            ValueError: where concept identity is asked for and the batch names none.
        """
        has_concepts = "patch_embeds" in embeddings
        usable = _usable_concepts(embeddings, batch) if has_concepts else torch.zeros(0, dtype=torch.bool)
        device = embeddings["image_embeds"].device
        counts = gather_counts([len(embeddings["image_embeds"]), int(usable.sum())], device)
        num_images, num_concepts = ([process[kind] for process in counts] for kind in (0, 1))

        image_text_share = self._image_text_share(embeddings, num_images)
        shares = {"image_text_loss": image_text_share}
        total_share = image_text_share
        if has_concepts:
            patch_concept_share = self._patch_concept_share(embeddings, batch, usable, num_images, num_concepts)
            shares["patch_concept_loss"] = patch_concept_share
            total_share = total_share + self.patch_concept_loss_weight * patch_concept_share
        shares["total_loss"] = total_share

        log = dict(zip(shares, sum_over_processes(torch.stack(list(shares.values()))), strict=True))
        log["num_images"] = torch.tensor(float(sum(num_images)))
        if has_concepts:
            log["num_concepts"] = torch.tensor(float(sum(num_concepts)))
        scalars = {name: value.detach().mean() for name, value in embeddings.items() if "logit" in name}
        return {"loss": total_share * num_processes(), **log, **scalars}

    def _image_text_share(self, embeddings: dict[str, Tensor], num_images: list[int]) -> Tensor:
        """IT-Align of this process's images with the texts of all."""
        return image_text_alignment_loss(
            embeddings["image_embeds"],
            _gather_embeds(embeddings["text_embeds"], num_images),
            embeddings["logit_scale"].mean(),
            embeddings["logit_bias"].mean(),
            first_image_index=sum(num_images[: process_index()]),
        )

    def _patch_concept_share(
        self,
        embeddings: dict[str, Tensor],
        batch: Batch,
        usable: Tensor,
        num_images: list[int],
        num_concepts: list[int],
    ) -> Tensor:
        """PC-Align of this process's patches with the concepts of all; the patches never travel."""
        first_image_index = sum(num_images[: process_index()])
        image_of_concept = usable.nonzero()[:, 0] + first_image_index
        labels = [image_of_concept]
        if self.use_concept_identity:
            labels.append(_concept_ids(batch)[usable])
        concept_to_image, *concept_ids = gather_rows(torch.stack(labels, dim=1), num_concepts).unbind(1)
        return patch_concept_alignment_loss(
            embeddings["patch_embeds"],
            _gather_embeds(embeddings["concept_embeds"][usable], num_concepts),
            concept_to_image,
            embeddings["concept_logit_scale"].mean(),
            embeddings["concept_logit_bias"].mean(),
            first_image_index=first_image_index,
            concept_ids=concept_ids[0] if concept_ids else None,
        )


def _one_empty_row(batch: Batch) -> Batch:
    """A row of zeros in place of none: towers refuse empty batches, but a process without rows has to run the model.

    DistributedDataParallel waits for its gradients. Nothing is masked from attention, whose output were NaN otherwise.
    """
    tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
    return {name: values.new_full((1, *values.shape[1:]), name == "attention_mask") for name, values in tensors.items()}


def _usable_concepts(embeddings: dict[str, Tensor], batch: Batch) -> Tensor:
    """Which concepts of the batch have a vector, (B, C) bool."""
    if "concept_token_spans" not in batch:
        raise ValueError(
            "The model aligns patches with concepts, but the batch has no concept_token_spans. Give the collator rows "
            "with concepts, or build the model with use_patch_concept_alignment=False."
        )
    return usable_concepts(batch["concept_token_spans"], batch["concept_mask"], batch["input_ids"].shape[1])


def _concept_ids(batch: Batch) -> Tensor:
    if "concept_ids" not in batch:
        raise ValueError(
            "use_concept_identity needs concept_ids (B, C) in the batch, and there are none. Let the collator give "
            "them, or build the objective with use_concept_identity=False."
        )
    return batch["concept_ids"]


def _gather_embeds(embeds: Tensor, counts: list[int]) -> Tensor:
    """Those of all processes, in float32 at least: their gradients are added up over processes in that precision."""
    return gather_rows(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), counts)
