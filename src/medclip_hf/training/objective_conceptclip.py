"""What ConceptCLIP is trained for: IT-Align of the global batch, and PC-Align of its patches with all concepts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import EllipsisType

import torch
from torch import Tensor

from medclip_hf.modeling.conceptclip.loss_conceptclip import (
    image_text_alignment_loss,
    patch_concept_alignment_loss,
    usable_concepts,
)
from medclip_hf.processing.pixels import scaled_pixels
from medclip_hf.training.distributed import (
    ROWS_AT_ONCE,
    Block,
    gather_counts,
    in_float32,
    num_processes,
    process_index,
    sum_over_blocks,
    sum_over_processes,
)
from medclip_hf.training.gradients import Batch
from medclip_hf.training.text_lengths import without_padding

Places = tuple[Tensor, Tensor]  # rows and columns


class ConceptCLIPObjective:
    """Image-text alignment of the global batch, and patch-concept alignment where the model has it.

    Args:
        patch_concept_loss_weight: weight of PC-Align beside IT-Align; 0.5 as published. A model without patch-concept
            alignment (stage 1) is trained by IT-Align alone.
        use_concept_identity: whether a concept is no negative of an image whose own caption names the same one. The
            release counts it as one.
        rows_at_once: texts or concepts of all processes that meet this process's images at a time; it bounds the memory
            of the losses, whatever the number of processes.
        search_dtype: precision in which the best patch is looked for, bfloat16 where the towers run in it; its
            similarity is float32 all the same. None: that of the embeddings.
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

    streamed_name = "patch_embeds"

    def __init__(
        self,
        patch_concept_loss_weight: float = 0.5,
        use_concept_identity: bool = True,
        rows_at_once: int = ROWS_AT_ONCE,
        search_dtype: torch.dtype | None = None,
    ) -> None:
        self.patch_concept_loss_weight = patch_concept_loss_weight
        self.use_concept_identity = use_concept_identity
        self.rows_at_once = rows_at_once
        self.search_dtype = search_dtype

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """At most `num_chunks` micro-batches of nearly equal size; at least one, none empty unless the batch is.

        They hold what belongs to their rows; `set_aside`, which belongs to no row, stays with the batch. Each is padded
        to its own longest text, so collators that sort by length save most of the padding.
        """
        if num_chunks < 1:
            raise ValueError(f"num_chunks should be at least 1, got {num_chunks}.")
        num_rows = len(batch["input_ids"])
        num_chunks = min(num_chunks, max(num_rows, 1))
        bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
        by_row = {name: values for name, values in batch.items() if name != "set_aside"}
        return [
            without_padding({name: values[start:stop] for name, values in by_row.items()})
            for start, stop in pairwise(bounds)
        ]

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The model's embeddings of the batch, with its scales and biases as they are now.

        A batch without rows gives embeddings without rows that still depend on every parameter.
        """
        inputs = {name: batch[name] for name in self.model_inputs if name in batch}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = scaled_pixels(batch)
        if any(len(values) == 0 for values in inputs.values()):
            embeddings = self.embed(model, _one_empty_row(inputs))
            return {name: value if "logit" in name else value[:0] for name, value in embeddings.items()}
        outputs = model(**inputs, return_loss=False, return_logits=False)
        return {name: outputs[name] for name in self.embedding_names if outputs.get(name) is not None}

    def embed_images(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `embed` gives for the images, without the texts."""
        embeddings = self.embed(model, {"pixel_values": scaled_pixels(batch)})
        return {name: value for name, value in embeddings.items() if "logit" not in name}

    def embed_texts(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `embed` gives for the texts, without the images; scales and biases are with them."""
        return self.embed(model, {name: values for name, values in batch.items() if name != "pixel_values"})

    def open_stream(self, leaves: dict[str, Tensor], batch: Batch, num_parts: int) -> PatchConceptStream:
        """PC-Align for patches that go by, beside `compare` of all else; see there for the arguments."""
        return PatchConceptStream(self, leaves, batch, num_parts)

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global values for the log, detached and equal on all processes.

        Args:
            embeddings: of the whole batch, as `embed` gives them, concatenated over micro-batches. Scales and biases
                may have come k times and count by their mean. Without `patch_embeds` it is IT-Align alone.
            batch: what was embedded.

        Raises:
            ValueError: where concept identity is asked for and the batch names none.
        """
        has_concepts = "patch_embeds" in embeddings
        usable = _usable_concepts(batch) if has_concepts else (torch.zeros(0, dtype=torch.int64),) * 2
        device = embeddings["image_embeds"].device
        counts = gather_counts([len(embeddings["image_embeds"]), len(usable[0])], device)
        num_images, num_concepts = ([process[kind] for process in counts] for kind in (0, 1))

        image_text_share = self._image_text_share(embeddings, num_images)
        shares = {"image_text_loss": image_text_share}
        total_share = image_text_share
        if has_concepts:
            concepts = self._concepts_of_batch(embeddings, batch, usable, num_images, num_concepts)
            patch_concept_share = self._patch_concept_share(embeddings["patch_embeds"], concepts)
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
        """IT-Align of this process's images with the texts of all, a block of texts at a time."""

        def share_of_block(block: Block, images: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return image_text_alignment_loss(
                images,
                block.rows,
                scale,
                bias,
                first_image_index=block.first_own,
                captioned_images=block.own_rows,
                num_texts=sum(num_images),
            )

        texts = in_float32(embeddings["text_embeds"])
        scalars = (embeddings[name].mean() for name in ("logit_scale", "logit_bias"))
        nothing = texts.new_empty(len(texts), 0)
        return sum_over_blocks(
            share_of_block,
            texts,
            nothing,
            num_images,
            embeddings["image_embeds"],
            *scalars,
            rows_at_once=self.rows_at_once,
        )

    def _concepts_of_batch(
        self,
        embeddings: dict[str, Tensor],
        batch: Batch,
        usable: Places,
        num_images: list[int],
        num_concepts: list[int],
    ) -> _Concepts:
        first_image_index = sum(num_images[: process_index()])
        return _Concepts(
            embeds=in_float32(embeddings["concept_embeds"][usable]),
            to_image=usable[0] + first_image_index,
            ids=_concept_ids(batch)[usable] if self.use_concept_identity else None,
            counts=num_concepts,
            first_image_index=first_image_index,
            scale=embeddings["concept_logit_scale"].mean(),
            bias=embeddings["concept_logit_bias"].mean(),
        )

    def _patch_concept_share(self, patch_embeds: Tensor, concepts: _Concepts, first_row: int = 0) -> Tensor:
        """PC-Align of some of this process's images, from `first_row` on, with the concepts of all processes.

        The concepts go by block by block; the patches never travel.
        """
        labels = [concepts.to_image] if concepts.ids is None else [concepts.to_image, concepts.ids]

        def share_of_block(block: Block, patches: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            concept_to_image, *concept_ids = block.labels.unbind(1)
            # Nothing in this loss but the search obeys autocast.
            with torch.autocast(patches.device.type, self.search_dtype, enabled=self.search_dtype is not None):
                return patch_concept_alignment_loss(
                    patches,
                    block.rows,
                    concept_to_image,
                    scale,
                    bias,
                    first_image_index=concepts.first_image_index + first_row,
                    concept_ids=concept_ids[0] if concept_ids else None,
                    caption_concepts=None if concepts.ids is None else (concepts.to_image, concepts.ids),
                    num_concepts=sum(concepts.counts),
                )

        return sum_over_blocks(
            share_of_block,
            concepts.embeds,
            torch.stack(labels, dim=1),
            concepts.counts,
            patch_embeds,
            concepts.scale,
            concepts.bias,
            rows_at_once=self.rows_at_once,
        )


@dataclass(frozen=True)
class _Concepts:
    """Those of this process's captions that have a vector, and what PC-Align asks of them.

    Args:
        embeds (n, D): vectors.
        to_image (n,): global index of the image that each belongs to.
        ids (n,): which concept it is; None where that plays no part.
        counts: n of every process.
        first_image_index: of this process among all.
        scale (): exponentiated.
        bias ().
    """

    embeds: Tensor
    to_image: Tensor
    ids: Tensor | None
    counts: list[int]
    first_image_index: int
    scale: Tensor
    bias: Tensor


class PatchConceptStream:
    """PC-Align of a batch whose patches come micro-batch by micro-batch, for they are too many to be kept.

    The loss is a sum over images of what each one's own patches say of all concepts. So with the concepts at hand, an
    image's patches can be compared, differentiated and forgotten. At the published size the patches of 8,192 images
    would take 27 GB of float32; their concepts take 0.2 GB.

    Args:
        objective: whose loss it is.
        leaves: embeddings of the whole batch but its patches, leaves of the graph that have their gradients so far.
        batch: what was embedded.
        num_parts: how often `add` will be called. Processes may differ; `finish` makes up for it.
    """

    def __init__(
        self, objective: ConceptCLIPObjective, leaves: dict[str, Tensor], batch: Batch, num_parts: int
    ) -> None:
        self.objective, self.leaves = objective, leaves
        self.usable = _usable_concepts(batch)
        sizes = [len(leaves["image_embeds"]), len(self.usable[0]), num_parts]
        counts = gather_counts(sizes, leaves["image_embeds"].device)
        num_images, num_concepts, everyones_parts = ([process[kind] for process in counts] for kind in (0, 1, 2))
        self.num_missing = max(everyones_parts) - num_parts
        with torch.no_grad():
            concepts = objective._concepts_of_batch(leaves, batch, self.usable, num_images, num_concepts)
        learning = {name: getattr(concepts, name).detach().requires_grad_() for name in ("embeds", "scale", "bias")}
        self.concepts = replace(concepts, **learning)
        self.num_rows = 0
        self.share = torch.zeros((), device=concepts.embeds.device, dtype=concepts.embeds.dtype)

    def add(self, patch_embeds: Tensor) -> Tensor:
        """The gradient (m, P, D) at the patches of the next m images; a collective call."""
        patches = patch_embeds.detach().requires_grad_()
        share = self.objective._patch_concept_share(patches, self.concepts, self.num_rows)
        (share * self.objective.patch_concept_loss_weight * num_processes()).backward()
        self.num_rows += len(patches)
        self.share += share.detach()
        self.shape = patches.shape[1:]
        assert patches.grad is not None
        return patches.grad

    def finish(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """`values` of `compare` with this loss in them; the leaves' gradients get its part as well."""
        for _ in range(self.num_missing):  # the other processes have more parts, and every part is a collective call
            self.add(self.concepts.embeds.new_zeros(0, *self.shape))
        _add_gradient(self.leaves["concept_embeds"], self.concepts.embeds.grad, self.usable)
        for name, scalar in (("logit_scale", self.concepts.scale), ("logit_bias", self.concepts.bias)):
            leaf = self.leaves[f"concept_{name}"]
            if scalar.grad is not None:  # of a mean over as many entries as there were passes
                _add_gradient(leaf, (scalar.grad / leaf.numel()).expand_as(leaf))
        loss = sum_over_processes(self.share)
        weighted = self.objective.patch_concept_loss_weight * self.share
        return values | {
            "loss": values["loss"].detach() + weighted * num_processes(),
            "patch_concept_loss": loss,
            "total_loss": values["total_loss"] + self.objective.patch_concept_loss_weight * loss,
            "num_concepts": torch.tensor(float(sum(self.concepts.counts))),
        }


def _add_gradient(leaf: Tensor, gradient: Tensor | None, where: Places | EllipsisType = ...) -> None:
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf)
    if gradient is not None:
        leaf.grad[where] += gradient.to(leaf.dtype)


def _one_empty_row(batch: Batch) -> Batch:
    """A row of zeros in place of none: towers refuse empty batches, but a process without rows has to run the model.

    DistributedDataParallel waits for its gradients. Nothing is masked from attention, whose output were NaN otherwise.
    """
    tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
    return {name: values.new_full((1, *values.shape[1:]), name == "attention_mask") for name, values in tensors.items()}


def _usable_concepts(batch: Batch) -> Places:
    """Rows and columns (n,) each of the concepts of the batch that have a vector.

    Places and not a mask: the device is asked once how many they are, and not again wherever the mask would be used.
    """
    if "concept_token_spans" not in batch:
        raise ValueError(
            "The model aligns patches with concepts, but the batch has no concept_token_spans. Give the collator rows "
            "with concepts, or build the model with use_patch_concept_alignment=False."
        )
    usable = usable_concepts(batch["concept_token_spans"], batch["concept_mask"], batch["input_ids"].shape[1])
    rows, columns = usable.nonzero().unbind(1)
    return rows, columns


def _concept_ids(batch: Batch) -> Tensor:
    if "concept_ids" not in batch:
        raise ValueError(
            "use_concept_identity needs concept_ids (B, C) in the batch, and there are none. Let the collator give "
            "them, or build the objective with use_concept_identity=False."
        )
    return batch["concept_ids"]
