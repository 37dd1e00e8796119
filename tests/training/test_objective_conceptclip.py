"""ConceptCLIP's objective: micro-batches, the model's own loss, and several processes that equal one.

Run by pytest this file starts itself as the processes of gloo groups; each writes the gradients it ended with.
"""

import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, SiglipVisionConfig

from medclip_hf.modeling.conceptclip import loss_conceptclip
from medclip_hf.modeling.conceptclip.configuration_conceptclip import ConceptCLIPConfig
from medclip_hf.modeling.conceptclip.loss_conceptclip import pool_concepts
from medclip_hf.modeling.conceptclip.modeling_conceptclip import ConceptCLIPModel
from medclip_hf.training.gradients import backward
from medclip_hf.training.objectives import ConceptCLIPObjective

NUM_TOKENS = 10
CASES = {  # number of processes: name: (rows of each process, concepts of each row)
    2: {
        "unequal": ([3, 2], [2, 0, 1, 3, 1]),
        "concepts on one process": ([2, 2], [2, 1, 0, 0]),
        "rows on one process": ([4, 0], [1, 2, 0, 1]),
        "no concept": ([2, 1], [0, 0, 0]),
        "no row": ([0, 0], []),
        "stage 1": ([1, 2], [1, 1, 1]),
    },
    4: {
        "unequal": ([2, 1, 1, 2], [2, 3, 0, 1, 2, 1]),
        "rows and concepts on some": ([2, 0, 1, 1], [2, 1, 0, 3]),
    },
    3: {"unequal": ([1, 3, 2], [2, 3, 0, 1, 2, 1])},
    8: {"unequal": ([1, 2, 0, 1, 1, 3, 1, 1], [2, 3, 0, 1, 2, 1, 0, 1, 4, 2])},
}
MICRO_BATCHES = "micro-batches"  # whose number differs between processes where one has fewer rows than it
ROWS_AT_ONCE = {"in one block": 8192, "block by block": 1}  # at least one of every process
WAYS = (*ROWS_AT_ONCE, MICRO_BATCHES)
EVERY_CASE = [(size, case, way) for size, cases in CASES.items() for case in cases for way in WAYS]


def tiny_model(with_concepts=True):
    """In float64, so that the order of additions does not show, and without dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = ConceptCLIPConfig(
        text_config=BertConfig(**sizes, vocab_size=50, max_position_embeddings=NUM_TOKENS).to_dict(),
        vision_config=SiglipVisionConfig(**sizes, image_size=12, patch_size=4).to_dict(),
        use_patch_concept_alignment=with_concepts,
        logit_bias_init_value=-2.0,
    )
    return ConceptCLIPModel(config).double().eval()


def make_batch(concepts_of_rows):
    """Random rows; concept identities are few, so that captions share them."""
    generator = torch.Generator().manual_seed(1)
    num_rows, most = len(concepts_of_rows), max([1, *concepts_of_rows])
    lengths = torch.randint(6, NUM_TOKENS + 1, (num_rows, 1), generator=generator)
    attention_mask = (torch.arange(NUM_TOKENS) < lengths).long()
    starts = torch.randint(1, 4, (num_rows, most), generator=generator)
    return {
        "pixel_values": torch.randn(num_rows, 3, 12, 12, generator=generator, dtype=torch.float64),
        "input_ids": torch.randint(1, 50, (num_rows, NUM_TOKENS), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "token_type_ids": torch.zeros(num_rows, NUM_TOKENS, dtype=torch.int64),
        "concept_token_spans": torch.stack([starts, starts + 2], dim=-1),
        "concept_mask": torch.arange(most) < torch.tensor(concepts_of_rows, dtype=torch.int64).view(-1, 1),
        "concept_ids": torch.randint(3, (num_rows, most), generator=generator),
        "row_ids": [f"row-{row}" for row in range(num_rows)],
        "set_aside": [{"row_id": "lost", "reason": "image unreadable", "detail": ""}],
    }


def rows_of_process(batch, rows, rank):
    """Its share of the batch, padded no further than the share needs, as its own collator would have done."""
    start = sum(rows[:rank])
    share = {
        name: values[start : start + rows[rank]] for name, values in batch.items() if isinstance(values, torch.Tensor)
    }
    num_tokens = max([3, *share["attention_mask"].sum(1).tolist()])
    num_concepts = max([1, *share["concept_mask"].sum(1).tolist()])
    return {
        name: values[:, :num_tokens]
        if name in ("input_ids", "attention_mask", "token_type_ids")
        else (values[:, :num_concepts] if name.startswith("concept") else values)
        for name, values in share.items()
    }


def step(model, objective, batch):
    """The gradients of one step by parameter, and what is logged."""
    values = objective.compare(objective.embed(model, batch), batch)
    values["loss"].backward()
    gradients = {f"gradient {name.removeprefix('module.')}": p.grad for name, p in model.named_parameters()}
    return gradients | {f"log {name}": value for name, value in values.items() if name != "loss"}


def golden_share(tensors, rank):
    """The embeddings of one process of the reference values as leaves, and its batch."""
    spans = tensors[f"rank{rank}.in.meta_infos"] + 1
    mask = torch.arange(spans.shape[1]) < tensors[f"rank{rank}.in.span_nums"].unsqueeze(1)
    tokens = tensors[f"rank{rank}.in.text_token_features"]
    embeddings = {
        "image_embeds": tensors[f"rank{rank}.in.image_features"],
        "text_embeds": tensors[f"rank{rank}.in.text_features"],
        "logit_scale": tensors["in.logit_scale"],
        "logit_bias": tensors["in.logit_bias"],
        "patch_embeds": torch.nn.functional.normalize(tensors[f"rank{rank}.in.image_token_features"], dim=-1),
        "concept_embeds": pool_concepts(tokens, spans, mask),
        "concept_logit_scale": tensors["in.concept_logit_scale"],
        "concept_logit_bias": tensors["in.concept_logit_bias"],
    }
    batch = {"concept_token_spans": spans, "concept_mask": mask, "input_ids": tokens[..., 0]}
    return {name: value.clone().requires_grad_() for name, value in embeddings.items()}, batch


def golden_step(embeddings, batch):
    values = ConceptCLIPObjective(use_concept_identity=False).compare(embeddings, batch)
    values["loss"].backward()
    return {name: leaf.grad for name, leaf in embeddings.items()} | {
        f"log {name}": value for name, value in values.items() if name != "loss"
    }


class PlainAccelerator:
    """As much of an Accelerator as a backward pass asks for."""

    device = torch.device("cpu")

    def no_sync(self, model):
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def step_by_micro_batches(model, objective, batch, num_micro_batches):
    values = backward(model, objective, batch, num_micro_batches, PlainAccelerator())
    gradients = {f"gradient {name.removeprefix('module.')}": p.grad for name, p in model.named_parameters()}
    return gradients | {f"log {name}": value for name, value in values.items() if name != "loss"}


def process_main(rank, world_size, folder, goldens):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=180),
    )  # fmt: skip
    for case, (rows, concepts_of_rows) in CASES[world_size].items():
        batch = rows_of_process(make_batch(concepts_of_rows), rows, rank)
        for blocks, rows_at_once in ROWS_AT_ONCE.items():
            model = DistributedDataParallel(tiny_model(with_concepts=case != "stage 1"))
            found = step(model, ConceptCLIPObjective(rows_at_once=rows_at_once), batch)
            save_file(found, folder / f"{world_size}-{case}-{blocks}-{rank}")
        model = DistributedDataParallel(tiny_model(with_concepts=case != "stage 1"))
        found = step_by_micro_batches(model, ConceptCLIPObjective(rows_at_once=4), batch, num_micro_batches=3)
        save_file(found, folder / f"{world_size}-{case}-{MICRO_BATCHES}-{rank}")
    golden = goldens / "conceptclip_losses_base_ws2.safetensors"
    if world_size == 2 and golden.exists():
        save_file(golden_step(*golden_share(load_file(golden), rank)), folder / f"golden-{rank}")
    del model  # one that outlives the group ends it a second time, which at times waits for ever in gloo
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repository):
    """Where the processes of all groups left what they found."""
    folder = tmp_path_factory.mktemp("groups")
    shared = Path(os.environ.get("MEDCLIP_HF_SHARED", repository.parent / "shared"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, folder, shared / "goldens"]
    subprocess.run(command, env=environment, check=True, timeout=240)
    return folder


@pytest.mark.parametrize(("world_size", "case", "way"), EVERY_CASE)
def test_several_processes_equal_one(world_size, case, way, folder):
    rows, concepts_of_rows = CASES[world_size][case]
    expected = step(tiny_model(with_concepts=case != "stage 1"), ConceptCLIPObjective(), make_batch(concepts_of_rows))
    for rank in range(world_size):
        found = load_file(folder / f"{world_size}-{case}-{way}-{rank}")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert expected["log num_images"] == sum(rows)
    assert all(value.isfinite().all() for value in expected.values())


def test_without_concepts_the_heads_have_zero_gradients(folder):
    gradients = load_file(folder / "2-no concept-block by block-0")
    heads = [name for name in gradients if "token_projection" in name or "patch_projection" in name]
    assert heads
    assert all((gradients[name] == 0).all() for name in heads)
    assert gradients["log patch_concept_loss"] == 0


def test_two_processes_give_the_official_image_text_gradients_and_those_of_one_process(goldens, folder):
    tensors = load_file(goldens / "conceptclip_losses_base_ws2.safetensors")
    found = [load_file(folder / f"golden-{rank}") for rank in (0, 1)]
    official_loss = tensors["ddp_mean.out.contrastive_loss"]
    torch.testing.assert_close(found[0]["log image_text_loss"], official_loss, rtol=1e-5, atol=1e-6)
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    for name, official in (("image_embeds", "image_features"), ("text_embeds", "text_features")):
        gradient = torch.cat([process[name] for process in found]) / 2
        torch.testing.assert_close(gradient, tensors[f"ddp_mean.grad_contrastive.{official}"], **tolerance)
    for name in ("logit_scale", "logit_bias"):
        gradient = (found[0][name] + found[1][name]) / 2
        torch.testing.assert_close(gradient, tensors[f"ddp_mean.grad_contrastive.{name}"], **tolerance)

    one_process = golden_step(*merge_shares(golden_share(tensors, 0), golden_share(tensors, 1)))
    torch.testing.assert_close(found[0]["log total_loss"], one_process["log total_loss"], rtol=1e-5, atol=1e-6)
    gradient = torch.cat([process["patch_embeds"] for process in found]) / 2
    torch.testing.assert_close(gradient, one_process["patch_embeds"], **tolerance)


def merge_shares(first, second):
    """Two processes' embeddings and batches as one process would hold them; concepts padded to the same number."""
    num_concepts = max(batch["concept_mask"].shape[1] for _, batch in (first, second))

    def pad(values):
        missing = num_concepts - values.shape[1]
        return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)

    merged = []
    for ours, theirs in zip(first, second, strict=True):
        merged.append({})
        for name in ours:
            pair = [pad(x) if name.startswith("concept_") and x.dim() > 1 else x for x in (ours[name], theirs[name])]
            merged[-1][name] = (torch.cat(pair) if pair[0].dim() else pair[0]).detach()
    return {name: value.requires_grad_() for name, value in merged[0].items()}, merged[1]


# One process


BATCH_CONCEPTS = [2, 0, 1, 3, 1]


@pytest.mark.parametrize("use_concept_identity", [True, False])
def test_the_objective_is_the_models_own_loss(use_concept_identity):
    model, batch = tiny_model(), make_batch(BATCH_CONCEPTS)
    objective = ConceptCLIPObjective(use_concept_identity=use_concept_identity)
    values = objective.compare(objective.embed(model, batch), batch)
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if not use_concept_identity:
        del inputs["concept_ids"]
    own = model(**inputs, return_loss=True)
    for name, expected in (("image_text_loss", own.image_text_loss), ("patch_concept_loss", own.patch_concept_loss)):
        torch.testing.assert_close(values[name], expected.detach())
    torch.testing.assert_close(values["loss"], own.loss)
    torch.testing.assert_close(values["total_loss"], own.loss.detach())


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_best_patch_is_looked_for_in_the_precision_asked_for(monkeypatch, num_micro_batches):
    looked_for_in = set()

    def search(patches, concepts, dtype):
        looked_for_in.add(dtype)
        return search_by_chunks(patches, concepts, dtype)

    search_by_chunks = loss_conceptclip._search_by_chunks
    monkeypatch.setattr(loss_conceptclip, "_search_by_chunks", search)
    losses = []
    for search_dtype in (None, torch.bfloat16):
        model, batch = tiny_model().float(), make_batch(BATCH_CONCEPTS)
        batch["pixel_values"] = batch["pixel_values"].float()
        objective = ConceptCLIPObjective(search_dtype=search_dtype)
        values = backward(model, objective, batch, num_micro_batches, PlainAccelerator())
        losses.append(values["loss"])
        assert looked_for_in == {search_dtype or torch.float32}
        looked_for_in.clear()
    # Where both find the same patch, or one as near, the loss is the same: nothing else is rounded.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def test_concept_identity_changes_the_loss_of_captions_that_share_a_concept():
    model, batch = tiny_model(), make_batch(BATCH_CONCEPTS)
    losses = []
    for use_concept_identity in (True, False):
        objective = ConceptCLIPObjective(use_concept_identity=use_concept_identity)
        losses.append(objective.compare(objective.embed(model, batch), batch)["patch_concept_loss"])
    assert losses[0] < losses[1]


@pytest.mark.parametrize("with_concepts", [True, False])
@pytest.mark.parametrize("num_micro_batches", [2, 3, 5])
def test_patches_that_go_by_give_the_gradient_of_the_whole_batch(num_micro_batches, with_concepts):
    batch, objective = make_batch(BATCH_CONCEPTS), ConceptCLIPObjective()
    expected = step(tiny_model(with_concepts), objective, batch)
    found = step_by_micro_batches(tiny_model(with_concepts), objective, batch, num_micro_batches)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_patches_of_one_micro_batch_at_a_time_are_in_memory():
    alive = []

    class Watched(ConceptCLIPObjective):
        def embed_images(self, model, batch):
            embeddings = super().embed_images(model, batch)
            assert sum(patches() is not None for patches in alive) == 0
            alive.append(weakref.ref(embeddings["patch_embeds"]))
            return embeddings

    step_by_micro_batches(tiny_model(), Watched(), make_batch(BATCH_CONCEPTS), num_micro_batches=5)
    assert len(alive) == 8  # four passes twice; the last goes through both towers


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 9])
def test_micro_batches_embedded_one_by_one_give_the_losses_of_the_batch(num_chunks):
    model, batch, objective = tiny_model(), make_batch(BATCH_CONCEPTS), ConceptCLIPObjective()
    micro_batches = objective.split(batch, num_chunks)
    assert len(micro_batches) == min(num_chunks, 5)
    assert [row for m in micro_batches for row in m["row_ids"]] == batch["row_ids"]
    sizes = [len(m["input_ids"]) for m in micro_batches]
    assert max(sizes) - min(sizes) <= 1
    parts = [objective.embed(model, micro_batch) for micro_batch in micro_batches]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = objective.compare(joined, batch)
    whole = objective.compare(objective.embed(model, batch), batch)
    for name in whole:
        torch.testing.assert_close(values[name], whole[name])
    parameters = list(model.parameters())
    found = torch.autograd.grad(values["loss"], parameters)
    for ours, expected in zip(found, torch.autograd.grad(whole["loss"], parameters), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_span_outside_the_text_counts_as_no_concept():
    model, objective = tiny_model(), ConceptCLIPObjective()
    batch, without = make_batch([2, 1]), make_batch([2, 1])
    batch["concept_token_spans"][0, 1] = torch.tensor([4, NUM_TOKENS + 1])
    without["concept_mask"][0, 1] = False
    values, expected = (objective.compare(objective.embed(model, b), b) for b in (batch, without))
    assert values["num_concepts"] == 2
    assert values["total_loss"] == expected["total_loss"]


def test_under_bfloat16_autocast_the_losses_are_float32_and_gradients_finite():
    model, batch = tiny_model().float(), make_batch(BATCH_CONCEPTS)
    batch["pixel_values"] = batch["pixel_values"].float()
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, ConceptCLIPObjective(), batch)
    assert found["log total_loss"].dtype == torch.float32
    assert all(value.isfinite().all() for value in found.values())


def test_an_empty_batch_makes_one_empty_micro_batch():
    micro_batches = ConceptCLIPObjective().split(make_batch([]), 4)
    assert [len(m["input_ids"]) for m in micro_batches] == [0]


def test_what_is_missing_from_the_batch_is_named():
    model, objective = tiny_model(), ConceptCLIPObjective()
    batch = make_batch([1, 1])
    embeddings = objective.embed(model, batch)
    no_ids = {name: value for name, value in batch.items() if name != "concept_ids"}
    with pytest.raises(ValueError, match="use_concept_identity needs concept_ids"):
        objective.compare(embeddings, no_ids)
    no_spans = {name: value for name, value in batch.items() if name != "concept_token_spans"}
    with pytest.raises(ValueError, match="no concept_token_spans"):
        objective.compare(embeddings, no_spans)
    with pytest.raises(ValueError, match="num_chunks"):
        objective.split(batch, 0)


if __name__ == "__main__":
    for size in CASES:  # forked, so that the package is imported once
        start_processes(process_main, (size, Path(sys.argv[1]), Path(sys.argv[2])), nprocs=size, start_method="fork")
