"""fVLM's objective: micro-batches, the model's own loss, calibrations, and several processes that equal one.

Run by pytest this file starts itself as the processes of gloo groups; each writes the gradients it ended with.
"""

import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.training import text_lengths
from medclip_hf.training.calibration import CalibratedFVLMObjective, PeerModel, TextTeacher
from medclip_hf.training.gradients import StatefulObjective, backward
from medclip_hf.training.objectives import FVLMObjective

ANATOMIES = ("lung", "heart", "aorta")
SIZE_DHW = (4, 4, 8)
# Of each scan and anatomy: its text's number or -1, whether abnormal ("!"), cut off ("|") or not in the mask ("?").
SCANS = {
    "all": ["0! 1 2!", "3! 4! 5", "0! 6! 7!", "8 1 2!", "9! 4! 7!"],
    "no lung here": ["0! 1 2!", "3! 4! 5", "0! 6! 7!", "-1? 1 2!", "-1? 4! 7!"],
    "nothing to train here": ["0! 1 2!", "3! 4! 5", "0! 6! 7!", "8| 1| 2!|", "-1 -1? -1|"],
    "no abnormal heart at all": ["0! 1 2!", "3! 4 5", "0! 6 7!", "8 1 2!", "9! 4 7!"],
    "nothing to train at all": ["0 1 2", "3 4 5", "0 6 7", "8 1 2", "9 4 7"],
}
ROWS = {2: {name: [3, 2] for name in SCANS} | {"rows on one process": [5, 0]}, 4: {"all": [2, 1, 0, 2]}}
EVERY_CASE = [(size, case) for size, cases in ROWS.items() for case in cases]


def tiny_model(seed=0):
    """In float64, so that the order of additions does not show, and without dropout."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = FVLMConfig(
        text_config={**sizes, "vocab_size": 40, "hidden_size": 8, "max_position_embeddings": 16},
        vision_config={**sizes, "hidden_size": 16, "image_size_dhw": SIZE_DHW, "patch_size_dhw": (2, 2, 4)},
        anatomies=ANATOMIES,
        feature_layers=(0,),
        projection_dim=12,
    )
    model = FVLMModel(config).double().eval()
    for head in model.anatomy_heads:
        torch.nn.init.normal_(head.query)
    return model


def make_batch(scans):
    """The batch of these scans; texts are numbered by their first appearance, their ids by their number."""
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randn(8, 1, *SIZE_DHW, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 40, (10, 6), generator=generator)
    lengths = torch.randint(3, 7, (10,), generator=generator)
    numbers = [[int(entry.rstrip("!|?")) for entry in scan.split()] for scan in scans]
    rows = sorted({number for scan in numbers for number in scan if number >= 0})
    entries = [scan.split() for scan in scans]
    mask = torch.zeros(len(scans), *SIZE_DHW, dtype=torch.uint8)
    for row, scan in enumerate(entries):
        for anatomy, entry in enumerate(scan):
            if "?" not in entry:
                mask[row, anatomy, :, 1:6] = anatomy + 1
    width = max([1, *lengths[rows].tolist()])
    return {
        "pixel_values": volumes[: len(scans)],
        "anatomy_mask": mask,
        "input_ids": tokens[rows][:, :width],
        "attention_mask": (torch.arange(width) < lengths[rows][:, None]).long(),
        "text_ids": torch.tensor([1000 + row for row in rows], dtype=torch.int64),
        "text_index": torch.tensor([[rows.index(n) if n >= 0 else -1 for n in scan] for scan in numbers])
        .long()
        .view(-1, 3),
        "is_complete": torch.tensor([["|" not in e and "?" not in e for e in s] for s in entries]).bool().view(-1, 3),
        "is_abnormal": torch.tensor([["!" in e for e in s] for s in entries]).bool().view(-1, 3),
        "row_ids": list(scans),
        "set_aside": [],
    }


def share_of(case, rows, rank):
    """The batch of one process, with its own numbering of texts; volumes stay those of the whole batch."""
    scans = SCANS.get(case, SCANS["all"])
    start = sum(rows[:rank])
    share = make_batch(scans[start : start + rows[rank]])
    share["pixel_values"] = make_batch(scans)["pixel_values"][start : start + rows[rank]]
    return share


def objective_of(kind):
    """Hard targets, or one of both calibrations with weights of their own."""
    if kind == "hard":
        return FVLMObjective(ANATOMIES)
    other = tiny_model(seed=5)
    calibration = TextTeacher(other) if kind == "teacher" else PeerModel(other, peer_weight=0.5)
    return CalibratedFVLMObjective(ANATOMIES, calibration)


def step(model, objective, batch):
    """The gradients of one step by parameter, and what is logged."""
    values = objective.compare(objective.embed(model, batch), batch)
    values["loss"].backward()
    gradients = {f"gradient {name.removeprefix('module.')}": p.grad for name, p in model.named_parameters()}
    return gradients | {f"log {name}": value for name, value in values.items() if name not in ("loss", "num_texts")}


def process_main(rank, folder):
    """All groups in turn, in as many processes as the largest needs: starting one takes longer than what it does."""
    torch.set_num_threads(1)
    for world_size in sorted(ROWS):
        if rank < world_size:
            run_group(rank, world_size, folder)


def run_group(rank, world_size, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=180),
    )
    for case, rows in ROWS[world_size].items():
        for kind in ("hard", "teacher", "peer") if case == "all" else ("hard",):
            model = DistributedDataParallel(tiny_model())
            found = step(model, objective_of(kind), share_of(case, rows, rank))
            save_file(found, folder / f"{world_size}-{case}-{kind}-{rank}")
    del model  # one that outlives the group ends it a second time, which at times waits for ever in gloo
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes of all groups left what they found."""
    folder = tmp_path_factory.mktemp("groups")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder], env=environment, check=True, timeout=240)
    return folder


@pytest.mark.parametrize(("world_size", "case"), EVERY_CASE)
def test_several_processes_equal_one(world_size, case, folder):
    for kind in ("hard", "teacher", "peer") if case == "all" else ("hard",):
        expected = step(tiny_model(), objective_of(kind), make_batch(SCANS.get(case, SCANS["all"])))
        for rank in range(world_size):
            found = load_file(folder / f"{world_size}-{case}-{kind}-{rank}")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert all(value.isfinite().all() for value in expected.values())


def test_what_cannot_be_trained_gives_zero(folder):
    heart = load_file(folder / "2-no abnormal heart at all-hard-0")
    assert heart["log heart_loss"] == 0
    assert heart["log lung_loss"] > 0
    assert (heart["gradient anatomy_heads.1.projection.weight"] == 0).all()
    nothing = load_file(folder / "2-nothing to train at all-hard-1")
    assert nothing["log num_trained_anatomies"] == 0
    assert all((value == 0).all() for name, value in nothing.items() if name.startswith("gradient"))


def test_the_loss_is_the_models_own():
    model, batch = tiny_model(), make_batch(SCANS["all"])
    objective = FVLMObjective(ANATOMIES)
    values = objective.compare(objective.embed(model, batch), batch)
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    outputs = model(**inputs, return_loss=True)
    torch.testing.assert_close(values["loss"], outputs.loss)
    torch.testing.assert_close(values["aorta_loss"], outputs.anatomy_losses[2])


@pytest.mark.parametrize("kind", ["hard", "teacher", "peer"])
@pytest.mark.parametrize("num_chunks", [2, 3, 8])
def test_micro_batches_give_the_embeddings_of_the_whole_batch(kind, num_chunks):
    model, objective, batch = tiny_model(), objective_of(kind), make_batch(SCANS["no lung here"])
    chunks = objective.split(batch, num_chunks)
    assert len(chunks) == num_chunks
    parts = [objective.embed(model, chunk) for chunk in chunks]
    whole = objective.embed(model, batch)
    for name, value in whole.items():
        joined = torch.cat([part[name] for part in parts])
        if "logit_scale" in name:
            joined = joined[:1]
        torch.testing.assert_close(joined, value)
    joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
    torch.testing.assert_close(objective.compare(joined, batch)["loss"], objective.compare(whole, batch)["loss"])


@pytest.mark.parametrize("kind", ["hard", "teacher", "peer"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind):
    batch = make_batch(SCANS["all"])
    models = {num_micro_batches: tiny_model() for num_micro_batches in (1, 3, 8)}
    for num_micro_batches, model in models.items():
        backward(model, objective_of(kind), batch, num_micro_batches, Accelerator(cpu=True))
    for model in (models[3], models[8]):
        for (name, one), two in zip(models[1].named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_texts_in_groups_by_length_give_the_gradient_of_one_group(monkeypatch, num_micro_batches):
    monkeypatch.setattr(text_lengths, "_TOKENS_PER_BUCKET", 1)  # the texts have 3 to 6 tokens
    batch = make_batch(SCANS["all"])
    lengths, order = batch["attention_mask"].sum(dim=1).sort(descending=True, stable=True)
    batch |= {name: batch[name][order] for name in ("input_ids", "attention_mask", "text_ids")}
    places = torch.cat([order.argsort(), torch.tensor([-1])])
    batch |= {"text_index": places[batch["text_index"]], "text_lengths": lengths.tolist()}
    models = {text_buckets: tiny_model() for text_buckets in (1, 3)}
    for text_buckets, model in models.items():
        objective = FVLMObjective(ANATOMIES, text_buckets=text_buckets)
        backward(model, objective, batch, num_micro_batches, Accelerator(cpu=True))
    for one, two in zip(models[1].parameters(), models[3].parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_cannot_be_split_into_nothing():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FVLMObjective(ANATOMIES).split(make_batch(SCANS["all"]), 0)
    with pytest.raises(ValueError, match="text_buckets should be at least 1, got 0"):
        FVLMObjective(ANATOMIES, text_buckets=0)


# Calibrations ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_a_moving_average_of_the_text_tower():
    model = tiny_model()
    teacher = TextTeacher(model, momentum=0.75)
    old = teacher.text_projection.weight.clone()
    with torch.no_grad():
        model.text_projection.weight.add_(1.0)
        model.text_model.embeddings.LayerNorm.bias.add_(4.0)
    teacher.after_step(model)
    torch.testing.assert_close(teacher.text_projection.weight, old + 0.25)
    torch.testing.assert_close(teacher.text_model.embeddings.LayerNorm.bias, torch.ones(8).double())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_state_of_the_teacher_survives_a_checkpoint():
    objective = objective_of("teacher")
    other = CalibratedFVLMObjective(ANATOMIES, TextTeacher(tiny_model(seed=9)))
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    for name, value in objective.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_the_weight_of_the_peer_climbs_its_ramp_and_survives_a_checkpoint():
    objective = CalibratedFVLMObjective(ANATOMIES, PeerModel(tiny_model(), peer_weight=0.5, ramp_steps=4))
    weights = []
    for _ in range(6):
        weights.append(objective.calibration.peer_weight)
        objective.after_step(tiny_model())
    assert weights == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    continued = CalibratedFVLMObjective(ANATOMIES, PeerModel(tiny_model(), peer_weight=0.5, ramp_steps=12))
    continued.load_state_dict(objective.state_dict())
    assert continued.calibration.peer_weight == 0.25


def test_calibrations_change_the_loss_and_the_loop_knows_their_state():
    model, batch = tiny_model(), make_batch(SCANS["all"])
    losses = {}
    for kind in ("hard", "teacher", "peer"):
        objective = objective_of(kind)
        assert isinstance(objective, StatefulObjective) == (kind != "hard")
        losses[kind] = objective.compare(objective.embed(model, batch), batch)["loss"].item()
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TextTeacher(tiny_model(), momentum=1.0), r"share in \[0, 1\), but 1.0"),
        (lambda: PeerModel(tiny_model(), peer_weight=2.0), r"share in \[0, 1\]"),
        (lambda: PeerModel(tiny_model(), ramp_steps=-1), "not negative"),
    ],
)
def test_calibrations_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


if __name__ == "__main__":
    start_processes(process_main, (Path(sys.argv[1]),), nprocs=max(ROWS), start_method="spawn")
