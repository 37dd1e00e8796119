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

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medclip_hf.modeling.conceptclip.loss_conceptclip import (
    image_text_alignment_loss,
    patch_concept_alignment_loss,
    usable_concepts,
)
from medclip_hf.modeling.fvlm.loss_fvlm import anatomy_alignment_loss, anatomy_logits
from medclip_hf.training.distributed import (
    ROWS_AT_ONCE,
    Block,
    gather_counts,
    gather_rows,
    num_processes,
    process_index,
    sum_over_blocks,
    sum_over_processes,
)
from medclip_hf.training.pixels import SCALING, scaled_pixels

Batch = Mapping[str, Any]
Places = tuple[Tensor, Tensor]  # rows and columns

_TOKENS_PER_BUCKET = 8  # texts are padded to a multiple: fewer shapes to compile, and what tensor cores like


class ConceptCLIPObjective:
    """Image-text alignment of the global batch, and patch-concept alignment where the model has it.

    Args:
        patch_concept_loss_weight: weight of PC-Align beside IT-Align; 0.5 as published. A model without patch-concept
            alignment (stage 1) is trained by IT-Align alone.
        use_concept_identity: whether a concept is no negative of an image whose own caption names the same one. The
            release counts it as one.
        rows_at_once: texts or concepts of all processes that meet this process's images at a time; it bounds the memory
            of the losses, whatever the number of processes.
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
    ) -> None:
        self.patch_concept_loss_weight = patch_concept_loss_weight
        self.use_concept_identity = use_concept_identity
        self.rows_at_once = rows_at_once

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
            _without_padding({name: values[start:stop] for name, values in by_row.items()})
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

        texts = _to_float(embeddings["text_embeds"])
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
            embeds=_to_float(embeddings["concept_embeds"][usable]),
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


def _without_padding(batch: Batch) -> Batch:
    """The same texts, padded to a multiple of a few tokens beyond the longest of them; `text_lengths` says its length.

    The lengths are numbers of the host: reading them from a mask on the device would stop it.
    """
    lengths = batch.get("text_lengths")
    if not lengths:
        return batch
    longest = -(-max(lengths) // _TOKENS_PER_BUCKET) * _TOKENS_PER_BUCKET
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: values[:, :longest] if name in names else values for name, values in batch.items()}


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


def _gather_embeds(embeds: Tensor, counts: list[int]) -> Tensor:
    """Those of all processes."""
    return gather_rows(_to_float(embeds), counts)


def _to_float(embeds: Tensor) -> Tensor:
    """In float32 at least: gradients are added up over processes in that precision."""
    return embeds.to(torch.promote_types(embeds.dtype, torch.float32))


class Calibration(Protocol):
    """What corrects the targets of abnormal scans, see `calibration.py`."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of the batch by another model, without gradients; named `teacher_...` or `peer_...`."""

    @property
    def peer_weight(self) -> float:
        """Weight of the peer's answers now; 0 where there is no peer."""


class FVLMObjective:
    """The disease-aware loss of every anatomy over the global batch.

    Args:
        anatomies: names of the model's anatomies, for the log.
        calibration: corrects the targets of abnormal scans; None trains as the release does, on hard targets.
    """

    image_inputs = ("pixel_values", "anatomy_mask")
    text_inputs = ("input_ids", "attention_mask")
    beside = (SCALING, "text_lengths")  # of the batch, where it has them

    def __init__(self, anatomies: Sequence[str], calibration: Calibration | None = None) -> None:
        self.anatomies = tuple(anatomies)
        self.calibration = calibration

    def split(self, batch: Batch, num_chunks: int) -> list[Batch]:
        """At most `num_chunks` micro-batches, each with its share of the scans and of the distinct texts.

        A micro-batch may hold scans alone or texts alone; both meet in `compare`.
        """
        if num_chunks < 1:
            raise ValueError(f"num_chunks should be at least 1, got {num_chunks}.")
        num_chunks = min(num_chunks, max(len(batch["pixel_values"]), len(batch["input_ids"]), 1))
        chunks: list[Batch] = [{} for _ in range(num_chunks)]
        present = [name for name in self.beside if name in batch]
        for name in (*self.image_inputs, *self.text_inputs, *present):
            bounds = [len(batch[name]) * chunk // num_chunks for chunk in range(num_chunks + 1)]
            for chunk, (start, stop) in zip(chunks, pairwise(bounds), strict=True):
                chunk[name] = batch[name][start:stop]  # type: ignore[index]
        return [_without_padding(chunk) for chunk in chunks]

    def embed(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of the scans' anatomies and of the texts, and the logit scale as it is now.

        Where there is no scan or no text, the embeddings without rows still depend on every parameter.
        """
        num_scans, num_texts = len(batch["pixel_values"]), len(batch["input_ids"])
        inputs = {name: batch[name] for name in (*self.image_inputs, *self.text_inputs)}
        inputs = _with_stand_ins(model, inputs | {"pixel_values": scaled_pixels(batch)})
        outputs = model(**inputs, return_loss=False, return_logits=False)
        embeddings = {
            "anatomy_embeds": outputs["anatomy_embeds"][:num_scans],
            "anatomy_present": outputs["anatomy_present"][:num_scans],
            "text_embeds": outputs["text_embeds"][:num_texts],
            "logit_scale": outputs["logit_scale"],
        }
        if self.calibration is not None:
            others = self.calibration.embed(inputs)
            counts = {"anatomy": num_scans, "text": num_texts, "logit": 1}
            embeddings |= {name: value[: counts[name.split("_")[1]]] for name, value in others.items()}
        return embeddings

    def compare(self, embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` to call backward on, and the global values for the log, detached and equal on all processes.

        All processes compute the whole loss: its matrices are small, (anatomies, scans, scans), and the gradients of
        gathered rows, summed over processes, are then those of one process times the number of processes.

        Args:
            embeddings: of the whole batch, as `embed` gives them, concatenated over micro-batches.
            batch: what was embedded, with `text_index`, `text_ids`, `is_complete` and `is_abnormal`.
        """
        device = embeddings["anatomy_embeds"].device
        counts = gather_counts([len(embeddings["anatomy_embeds"]), len(embeddings["text_embeds"])], device)
        num_scans, num_texts = ([process[kind] for process in counts] for kind in (0, 1))
        rows, is_abnormal, is_used = _gather_labels(embeddings["anatomy_present"], batch, num_scans, num_texts)
        # The row behind the last text stands for "no text", which index -1 names.
        text_ids = F.pad(gather_rows(batch["text_ids"], num_texts), (0, 1))[rows]
        logit_scale = embeddings["logit_scale"].mean()
        losses = anatomy_alignment_loss(
            _gather_embeds(embeddings["anatomy_embeds"], num_scans),
            _texts_of_anatomies(embeddings["text_embeds"], rows, num_texts),
            logit_scale,
            text_ids=text_ids,
            is_abnormal=is_abnormal,
            is_used=is_used,
            **self._calibrated(embeddings, rows, num_scans, num_texts),
        )
        log = {f"{name}_loss": loss for name, loss in zip(self.anatomies, losses.detach(), strict=True)}
        return {
            "loss": losses.sum(),
            "total_loss": losses.detach().sum(),
            **log,
            "num_scans": torch.tensor(float(sum(num_scans))),
            "num_texts": torch.tensor(float(sum(num_texts))),
            "num_trained_anatomies": (losses.detach() > 0).sum().float(),
            "logit_scale": logit_scale.detach(),
        }

    def _calibrated(
        self, embeddings: dict[str, Tensor], rows: Tensor, num_scans: list[int], num_texts: list[int]
    ) -> dict[str, Any]:
        """What the calibration adds to the arguments of the loss."""
        arguments: dict[str, Any] = {}
        if self.calibration is None:
            return arguments
        if "teacher_text_embeds" in embeddings:
            texts = _texts_of_anatomies(embeddings["teacher_text_embeds"].detach(), rows, num_texts)
            arguments["teacher_text_embeds"] = texts
        if "peer_anatomy_embeds" in embeddings:
            images = _gather_embeds(embeddings["peer_anatomy_embeds"].detach(), num_scans)
            texts = _texts_of_anatomies(embeddings["peer_text_embeds"].detach(), rows, num_texts)
            scale = embeddings["peer_logit_scale"].detach().mean()
            arguments |= {
                "peer_logits": anatomy_logits(images, texts, scale),
                "peer_weight": self.calibration.peer_weight,
            }
        return arguments


def _with_stand_ins(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with one empty patch in place of no scan and one empty token in place of no text.

    Towers refuse empty batches, but every process has to run both: DistributedDataParallel waits for their gradients.
    """
    config: Any = getattr(model, "module", model).config
    if len(inputs["pixel_values"]) == 0:
        size_dhw = config.vision_config.patch_size_dhw
        channels = config.vision_config.num_channels
        inputs["pixel_values"] = inputs["pixel_values"].new_zeros(1, channels, *size_dhw)
        inputs["anatomy_mask"] = inputs["anatomy_mask"].new_ones(1, *size_dhw)
    if len(inputs["input_ids"]) == 0:
        inputs["input_ids"] = inputs["input_ids"].new_zeros(1, 1)
        inputs["attention_mask"] = inputs["attention_mask"].new_ones(1, 1)
    return inputs


def _gather_labels(
    anatomy_present: Tensor, batch: Batch, num_scans: list[int], num_texts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """For every anatomy of every scan (B, A): its text among all texts or -1, whether abnormal, whether used."""
    has_text = batch["text_index"] >= 0
    first_text = sum(num_texts[: process_index()])
    rows = torch.where(has_text, batch["text_index"] + first_text, -1)
    is_used = has_text & anatomy_present & batch["is_complete"].bool()
    labels = torch.stack([rows, batch["is_abnormal"].long(), is_used.long()], dim=-1)
    rows, is_abnormal, is_used = gather_rows(labels, num_scans).unbind(-1)
    return rows, is_abnormal.bool(), is_used.bool()


def _texts_of_anatomies(text_embeds: Tensor, rows: Tensor, num_texts: list[int]) -> Tensor:
    """(B, A, D): the text of every anatomy of every scan of all processes; zeros where it has none."""
    return F.pad(_gather_embeds(text_embeds, num_texts), (0, 0, 0, 1))[rows]
