"""Blocks that recompute or are compiled give the same gradients; texts in buckets give the same loss."""

import copy
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, SiglipVisionConfig

from medclip_hf.modeling.conceptclip import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.training.acceleration import (
    Watch,
    _check_compiler,
    compile_blocks,
    prepare_blocks,
    recompute_blocks,
    towers_of,
)
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.objectives import ConceptCLIPObjective


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return ConceptCLIPModel(ConceptCLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict())).train()


@pytest.fixture(scope="module")
def batch():
    """Three images whose captions have 12, 6 and 3 tokens."""
    lengths = [12, 6, 3]
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    torch.manual_seed(1)
    return {
        "pixel_values": torch.rand(3, 3, 16, 16),
        "input_ids": torch.randint(5, 40, (3, 12)) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros(3, 12, dtype=torch.int64),
        "concept_token_spans": torch.tensor([[[1, 3], [8, 11]], [[2, 4], [0, 0]], [[1, 2], [0, 0]]]),
        "concept_mask": torch.tensor([[True, True], [True, False], [True, False]]),
        "concept_ids": torch.tensor([[1, 2], [3, -1], [1, -1]]),
        "text_lengths": lengths,
        "row_ids": ["a", "b", "c"],
        "set_aside": [],
    }


def gradients_of(model, batch):
    torch.manual_seed(2)  # dropout
    objective = ConceptCLIPObjective()
    objective.compare(objective.embed(model, batch), batch)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def num_saved(model, batch):
    """Numbers that the graph keeps of activations; those of a tensor saved twice count once."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    objective = ConceptCLIPObjective()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective.embed(model, batch)
    return sum(sizes.values())


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_recomputed_blocks_give_the_same_gradients_with_dropout(model, batch, keep):
    recomputing = copy.deepcopy(model)
    recompute_blocks(recomputing, keep)
    expected = gradients_of(copy.deepcopy(model), batch)
    for name, gradient in gradients_of(recomputing, batch).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_budget_keeps_the_last_blocks_of_every_tower(model):
    recomputing = copy.deepcopy(model)
    recompute_blocks(recomputing, 0.5)
    recomputed = [[block.gradient_checkpointing for block in tower] for tower in towers_of(recomputing)]
    assert recomputed == [[True, True, False, False], [True, False]]


def test_memory_lies_between_that_of_all_and_of_none(model, batch):
    kept = []
    for keep in (0.0, 0.5, 1.0):
        recomputing = copy.deepcopy(model)
        recompute_blocks(recomputing, keep)
        kept.append(num_saved(recomputing, batch))
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] == num_saved(copy.deepcopy(model), batch)


@pytest.mark.parametrize("keep", [-0.1, 1.5, float("nan")])
def test_a_share_beyond_all_or_none_is_refused(model, keep):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        recompute_blocks(copy.deepcopy(model), keep)
    with pytest.raises(ValueError, match=r"training.keep_activations must lie in \[0, 1\]"):
        RunArguments(output_dir="x", max_steps=1, keep_activations=keep)


def test_a_model_without_blocks_is_refused():
    arguments = RunArguments(output_dir="x", max_steps=1, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="Linear has no blocks of transformers"):
        prepare_blocks(torch.nn.Linear(2, 2), arguments)
    with pytest.raises(ValueError, match="Linear has no blocks of transformers"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_compiled_blocks_keep_names_and_numbers(model, batch):
    compiled = copy.deepcopy(model).eval()
    objective = ConceptCLIPObjective()
    expected = objective.embed(compiled, batch)
    for tower in towers_of(compiled):
        for block in tower:
            block.compile(backend="eager")  # traces as the real one does; no C++ compiler runs
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for name, values in objective.embed(compiled, batch).items():
        torch.testing.assert_close(values, expected[name])


def test_every_block_is_compiled(model, monkeypatch):
    monkeypatch.setattr("medclip_hf.training.acceleration._check_compiler", lambda device: None)
    compiled = copy.deepcopy(model)
    assert compile_blocks(compiled) == 6
    assert all(block._compiled_call_impl is not None for tower in towers_of(compiled) for block in tower)


def test_a_gpu_without_triton_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="needs Triton"):
        _check_compiler(torch.device("cuda"))


def test_micro_batches_pad_to_their_own_longest_text_and_embed_the_same(model, batch):
    model = copy.deepcopy(model).eval()
    objective = ConceptCLIPObjective()
    parts = objective.split(batch, 3)
    assert [part["input_ids"].shape[1] for part in parts] == [12, 8, 8]  # multiples of 8, as far as there are tokens
    whole = objective.embed(model, batch)
    pieces = [objective.embed(model, part) for part in parts]
    for name in ("text_embeds", "concept_embeds", "image_embeds"):
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), whole[name], rtol=1e-5, atol=1e-6)


def test_a_watch_tells_what_share_of_the_time_was_waiting():
    def slow():
        for number in range(3):
            time.sleep(0.03)
            yield number

    watch = Watch(slow())
    assert list(watch) == [0, 1, 2]
    assert 0.8 < watch.share() <= 1
    time.sleep(0.02)
    assert watch.share() == 0.0


def test_a_watch_passes_on_what_a_loader_raises():
    def broken():
        yield 1
        raise OSError("a worker died")

    with pytest.raises(OSError, match="a worker died"):
        list(Watch(broken()))


class Masked(TorchDispatchMode):
    """Names the operations that ask the device for a value or its number of hits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        if name in ("nonzero", "_local_scalar_dense") or any(getattr(i, "dtype", None) == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_losses_ask_the_device_once_how_many_concepts_there_are(model, batch):
    objective = ConceptCLIPObjective()
    embeddings = objective.embed(model, batch)
    with Masked() as stops:
        objective.compare(embeddings, batch)["loss"].backward()
    assert stops.found == ["nonzero"]
