import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from medclip_hf.training import checkpoints
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.checkpoints import RunState
from medclip_hf.training.optimization import make_optimizer


@pytest.fixture
def save(tiny, tmp_path):
    """Saves a checkpoint of a model that has made one step; gives back folder, model and optimiser."""
    accelerator = Accelerator(cpu=True)

    def save(step, keep=None):
        model = tiny.new_model(seed=step)
        optimizer = make_optimizer(model, RunArguments(output_dir="unused", max_steps=1))
        model(torch.ones(2, 6), torch.ones(2, 6))[0].sum().backward()
        optimizer.step()
        state = RunState(step=step, num_rows=10, num_processes=1, arguments={"seed": 0})
        return checkpoints.save_checkpoint(tmp_path, state, model, optimizer, accelerator, keep=keep), model, optimizer

    save.accelerator = accelerator
    return save


def test_everything_comes_back_bit_for_bit(save, tiny):
    folder, model, optimizer = save(3)
    expected = (random.random(), np.random.rand(), np.random.randn(), torch.rand(2))
    restored = tiny.new_model(seed=99)
    restored_optimizer = make_optimizer(restored, RunArguments(output_dir="unused", max_steps=1))
    checkpoints.restore_checkpoint(folder, restored, restored_optimizer, save.accelerator)

    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in model.state_dict().items())
    for one, other in zip(model.parameters(), restored.parameters(), strict=True):
        assert optimizer.state.get(one, {}).keys() == restored_optimizer.state.get(other, {}).keys()
        for moment, value in optimizer.state.get(one, {}).items():
            assert torch.equal(value, restored_optimizer.state[other][moment])
    drawn = (random.random(), np.random.rand(), np.random.randn(), torch.rand(2))
    assert drawn[:3] == expected[:3]
    assert torch.equal(drawn[3], expected[3])


def test_nothing_is_pickled(save):
    folder, _, _ = save(1)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_the_newest_complete_checkpoint_is_found(save, tmp_path):
    for step in (1, 20, 3):
        save(step)
    assert checkpoints.find_checkpoint(tmp_path).name == "checkpoint-00000020"


def test_the_last_ones_are_kept(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "checkpoint-00000003",
        "checkpoint-00000004",
    ]


def _without_manifest(folder):
    (folder / "manifest.json").unlink()


def _torn_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {"mod')


def _cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def _lost_random_state(folder):
    (folder / "random_state-00000.safetensors").unlink()


def _never_renamed(folder):
    folder.rename(folder.with_name(folder.name + ".tmp"))


def _other_content(name, content=None):
    def damage(folder):
        file = folder / name
        file.write_bytes(bytes(file.stat().st_size) if content is None else content)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_other_content("model.safetensors"), "model.safetensors no longer holds what was written"),
        (_other_content("run_state.json"), "run_state.json no longer holds what was written"),
        (_other_content("manifest.json", b"[]"), "manifest.json is not readable"),
        (_other_content("manifest.json", b'{"files": 3}'), "manifest.json is not readable"),
        (_without_manifest, "has no manifest.json"),
        (_torn_manifest, "manifest.json is not readable"),
        (_cut_weights, "model.safetensors has .* bytes instead of"),
        (_lost_random_state, "random_state-00000.safetensors is missing"),
        (_never_renamed, "only half written"),
    ],
)
def test_a_half_written_checkpoint_is_named_and_passed_over(save, tmp_path, caplog, damage, reason):
    save(1)
    damage(save(2)[0])
    assert checkpoints.find_checkpoint(tmp_path).name == "checkpoint-00000001"
    (record,) = caplog.records
    assert "checkpoint-00000002" in record.getMessage()
    assert re.search(reason, record.getMessage())


def test_a_half_written_checkpoint_cannot_be_resumed_by_name(save):
    folder, _, _ = save(1)
    _cut_weights(folder)
    with pytest.raises(ValueError, match=r"checkpoint-00000001 cannot be resumed: model\.safetensors has"):
        checkpoints.read_run_state(folder)


def test_a_folder_that_is_no_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be resumed: it has no manifest\.json"):
        checkpoints.read_run_state(tmp_path)


def test_leftovers_of_a_killed_write_do_not_disturb_the_next(save, tmp_path):
    leftover = tmp_path / "checkpoints" / "checkpoint-00000002.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    folder, _, _ = save(2, keep=3)
    assert checkpoints.find_defect(folder) is None
    assert not leftover.exists()


def test_wherever_writing_breaks_off_a_whole_checkpoint_is_left(save, tmp_path, monkeypatch):
    """The disk fails at the first flush, the second, and so on, until one checkpoint gets through."""
    save(1)
    flush = checkpoints._flush
    for allowed in range(100):
        calls = iter(range(allowed))

        def failing(path, calls=calls):
            if next(calls, None) is None:
                raise OSError("no space left on device")
            flush(path)

        monkeypatch.setattr(checkpoints, "_flush", failing)
        try:
            save(2, keep=1)
        except OSError:
            found = checkpoints.find_checkpoint(tmp_path)
            assert found is not None
            assert checkpoints.read_run_state(found).step in (1, 2)
        else:
            break
    assert allowed > 5
    assert checkpoints.find_checkpoint(tmp_path).name == "checkpoint-00000002"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-00000002"]


def test_weights_of_another_model_are_refused(save, tiny):
    folder, _, _ = save(1)
    other = tiny.new_model()
    other.extra = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(other, RunArguments(output_dir="unused", max_steps=1))
    with pytest.raises(ValueError, match=r"missing \['extra.bias', 'extra.weight'\]"):
        checkpoints.restore_checkpoint(folder, other, optimizer, save.accelerator)


def test_where_an_adapter_alone_is_saved_the_trained_parameters_still_come_back(tiny, tmp_path):
    class Adapted(tiny.TwoTowers):
        def save_pretrained(self, folder, **kwargs):
            (folder / "adapter_config.json").write_text("{}")

    accelerator = Accelerator(cpu=True)
    model = Adapted(tiny.TwoTowerConfig())
    model.image.requires_grad_(False)
    optimizer = make_optimizer(model, RunArguments(output_dir="unused", max_steps=1))
    state = RunState(step=1, num_rows=10, num_processes=1, arguments={})
    folder = checkpoints.save_checkpoint(tmp_path, state, model, optimizer, accelerator)

    restored = Adapted(tiny.TwoTowerConfig())
    restored.image.load_state_dict(model.image.state_dict())
    restored.image.requires_grad_(False)
    optimizer = make_optimizer(restored, RunArguments(output_dir="unused", max_steps=1))
    checkpoints.restore_checkpoint(folder, restored, optimizer, accelerator)
    assert torch.equal(restored.text.weight, model.text.weight)


def test_a_final_model_replaces_the_one_before(tiny, tmp_path):
    for seed in (0, 1):
        checkpoints.save_model(tmp_path / "final", tiny.new_model(seed))
    assert torch.equal(tiny.TwoTowers.from_pretrained(tmp_path / "final").image.weight, tiny.new_model(1).image.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "run.json"
    for content in ({"long": "x" * 1000}, {"short": 1}):
        checkpoints.write_json(path, content)
    assert json.loads(path.read_text()) == {"short": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_copied_checkpoint_is_complete_too(save, tmp_path):
    folder, _, _ = save(1)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert checkpoints.read_run_state(tmp_path / "elsewhere").step == 1
