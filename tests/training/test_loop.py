import json

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.loop import NoRowsError, train


def arguments(folder, **changes):
    values = {"max_steps": 6, "batch_size_per_process": 8, "learning_rate": 1e-2, "progress_bar": False, "log_every": 1}
    return RunArguments(output_dir=str(folder), **values | changes)


def run(tiny, folder, *, dataset=None, collator=None, evaluate_fn=None, resume=False, model=None, **changes):
    return train(
        model or tiny.new_model(),
        dataset or tiny.Numbers(),
        collator or tiny.collate,
        tiny.Matching(),
        arguments(folder, **changes),
        evaluate_fn=evaluate_fn,
        resume=resume,
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_a_loadable_model(tiny, tmp_path):
    result = run(tiny, tmp_path, max_steps=60)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert result.status == "complete"
    assert result.exit_code == 0
    loaded = tiny.TwoTowers.from_pretrained(result.model_path)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert torch.equal(loaded.image.weight, saved["image.weight"])


def test_every_row_is_read_once_an_epoch(tiny, tmp_path):
    dataset = tiny.Numbers(24)
    run(tiny, tmp_path, dataset=dataset, num_epochs=2, max_steps=None)
    assert sorted(dataset.read) == [(epoch, index) for epoch in range(2) for index in range(24)]


def test_run_json_names_arguments_versions_and_status(tiny, tmp_path):
    run(tiny, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["step"] == 6
    assert record["arguments"]["learning_rate"] == 1e-2
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [start["status"] for start in record["starts"]] == ["complete"]


def test_rows_set_aside_are_counted_and_written_down(tiny, tmp_path):
    run(tiny, tmp_path, collator=tiny.collate_without_row_5)
    rows = [json.loads(line) for line in (tmp_path / "set_aside" / "rank-00000.jsonl").read_text().splitlines()]
    assert [(row["row_id"], row["reason"]) for row in rows] == [("row-5", "unreadable")] * 2  # once an epoch
    assert metrics(tmp_path)[-1]["rows_set_aside"] == 2


def test_validation_is_logged_and_does_not_change_the_training(tiny, tmp_path):
    def evaluate(model, step):
        assert not model.training
        return {"recall": torch.rand(1).item()}  # draws from the generator of the run

    with_validation = run(tiny, tmp_path / "with", evaluate_fn=evaluate, evaluate_every=4)
    without = run(tiny, tmp_path / "without")
    steps = [line["step"] for line in metrics(tmp_path / "with") if "validation_recall" in line]
    assert steps == [4, 6]
    assert 0 <= with_validation.metrics["validation_recall"] <= 1
    weights = [load_file(result.model_path / "model.safetensors") for result in (with_validation, without)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_logit_scale_is_clamped_after_each_step(tiny, tmp_path):
    model = tiny.new_model()
    torch.nn.init.constant_(model.logit_scale, 8.0)
    run(tiny, tmp_path, model=model, max_steps=1)
    assert model.logit_scale.item() == 3.0


def test_frozen_parameters_stay(tiny, tmp_path):
    model = tiny.new_model()
    model.text.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tiny, tmp_path, model=model)
    assert torch.equal(model.text.weight, before["text.weight"])
    assert not torch.equal(model.image.weight, before["image.weight"])


def test_a_loss_that_is_not_finite_stops_with_step_and_row(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d: .*'row-13'"):
        run(tiny, tmp_path, dataset=tiny.Numbers(with_nan=True))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_step_without_a_finite_loss_can_be_skipped(tiny, tmp_path):
    result = run(tiny, tmp_path, dataset=tiny.Numbers(with_nan=True), on_nonfinite_loss="skip")
    assert metrics(tmp_path)[-1]["skipped_steps"] == 2  # once an epoch
    weights = load_file(result.model_path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_skipping_does_not_go_on_forever(tiny, tmp_path):
    def collate_nan(examples):
        batch = tiny.collate(examples)
        return batch | {"left": batch["left"] * float("nan")}

    with pytest.raises(FloatingPointError, match="step 11"):
        run(tiny, tmp_path, collator=collate_nan, max_steps=20, on_nonfinite_loss="skip")


def test_a_run_whose_data_are_gone_leaves_the_weights_alone_and_ends(tiny, tmp_path):
    """From the third batch on every row is set aside."""
    num_batches = 0

    def collate(examples):
        nonlocal num_batches
        num_batches += 1
        whole = tiny.collate(examples)
        gone = [{"row_id": row_id, "reason": "unreadable", "detail": ""} for row_id in whole["row_ids"]]
        return whole if num_batches < 3 else {name: values[:0] for name, values in whole.items()} | {"set_aside": gone}

    class Objective(tiny.Matching):
        def compare(self, embeddings, batch):
            return super().compare(embeddings, batch) if batch["row_ids"] else {"loss": embeddings["image"].sum()}

    model, limits = tiny.new_model(), {"max_steps": 40, "checkpoint_every": 2, "keep_checkpoints": 20}
    with pytest.raises(NoRowsError, match=r"step 13: not one row .*'reason': 'unreadable'.* start again with --resume"):
        train(model, tiny.Numbers(), collate, Objective(), arguments(tmp_path, **limits))
    after_two = load_file(tmp_path / "checkpoints" / "checkpoint-00000002" / "model.safetensors")
    assert all(torch.equal(value, after_two[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, tmp_path):
    run(tiny, tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        run(tiny, tmp_path)


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written"):
        run(tiny, tmp_path / "file" / "run")


def test_a_disk_that_is_full_at_the_end_is_named_and_a_continued_run_writes_the_model(tiny, tmp_path, monkeypatch):
    def save_pretrained(self, folder, **_):
        if "final" in str(folder):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.TwoTowers, "save_pretrained", save_pretrained)
        with pytest.raises(OSError, match=r"final could not be written: .*No space left.*start again with --resume"):
            run(tiny, tmp_path)
    assert not (tmp_path / "final.tmp").exists()
    result = run(tiny, tmp_path, resume=True)
    assert tiny.TwoTowers.from_pretrained(result.model_path)


def test_fewer_rows_than_a_batch_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="5 rows, but one global batch takes 8"):
        run(tiny, tmp_path, dataset=tiny.Numbers(5))


def test_a_recipe_for_more_processes_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"made for 48 processes, but 1 run: .* 8 instead of 384"):
        run(tiny, tmp_path, num_processes=48)


def test_a_launch_that_started_one_process_of_several_is_refused(tiny, tmp_path, monkeypatch):
    # what `accelerate launch --cpu --num_processes 2` leaves in the environment
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="only one was started"):
        run(tiny, tmp_path)


def test_tensorboard_receives_the_metrics(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny, tmp_path, trackers=("tensorboard",))
    (events,) = (tmp_path / "trackers").rglob("events.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_an_unknown_tracker_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(ValueError, match="paperboard"):
        run(tiny, tmp_path, trackers=("paperboard",))
