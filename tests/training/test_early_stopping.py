"""The best validation is kept, and a run ends when nothing better comes, also after a resume."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.early_stopping import judge, read_validations
from medclip_hf.training.loop import train

RUN = {
    "max_steps": 12,
    "batch_size_per_process": 8,
    "learning_rate": 1e-2,
    "progress_bar": False,
    "checkpoint_every": 2,
}
BEST = {"evaluate_every": 2, "best_metric": "auroc"}


def arguments(folder, **changes):
    return RunArguments(output_dir=str(folder), **RUN | BEST | changes)


class Scripted:
    """A validation that says what it is told, and keeps the weights it saw."""

    def __init__(self, values, fail_at=None):
        self.values, self.fail_at, self.seen = values, fail_at, {}

    def __call__(self, model, step):
        if step == self.fail_at:
            raise OSError("the node is gone")
        self.seen[step] = model.image.weight.detach().clone()
        return {"auroc": self.values[step]}


def run(tiny, folder, evaluate, resume=False, **changes):
    settings = arguments(folder, **changes)
    return train(
        tiny.new_model(), tiny.Numbers(), tiny.collate, tiny.Matching(), settings, evaluate_fn=evaluate, resume=resume
    )


def final_weights(folder):
    return load_file(folder / "final" / "model.safetensors")["image.weight"]


def test_the_final_model_is_that_of_the_best_validation(tiny, tmp_path):
    evaluate = Scripted({2: 0.6, 4: 0.8, 6: 0.7, 8: 0.8, 10: 0.5, 12: 0.6})
    result = run(tiny, tmp_path, evaluate)
    assert result.step == 12
    assert torch.equal(final_weights(tmp_path), evaluate.seen[4])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000004"]


def test_a_run_ends_when_its_patience_does(tiny, tmp_path):
    evaluate = Scripted({2: 0.6, 4: 0.8, 6: 0.7, 8: 0.75})
    result = run(tiny, tmp_path, evaluate, early_stopping_patience=2)
    assert (result.status, result.step) == ("complete", 8)
    assert torch.equal(final_weights(tmp_path), evaluate.seen[4])


def test_less_can_be_better(tiny, tmp_path):
    evaluate = Scripted({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0})
    result = run(tiny, tmp_path, evaluate, best_metric_mode="min", early_stopping_patience=2)
    assert (result.step, torch.equal(final_weights(tmp_path), evaluate.seen[4])) == (8, True)


@pytest.mark.parametrize("fail_at", [4, 6, 10])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny, tmp_path, fail_at):
    values = {2: 0.6, 4: 0.8, 6: 0.7, 8: 0.9, 10: 0.7, 12: 0.8}
    whole = Scripted(values)
    run(tiny, tmp_path / "whole", whole)
    with pytest.raises(OSError, match="the node is gone"):
        run(tiny, tmp_path / "parts", Scripted(values, fail_at))
    run(tiny, tmp_path / "parts", Scripted(values), resume=True)
    assert torch.equal(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"))
    assert torch.equal(final_weights(tmp_path / "whole"), whole.seen[8])


def test_a_finished_run_that_is_resumed_keeps_its_best_model(tiny, tmp_path):
    evaluate = Scripted({2: 0.6, 4: 0.8, 6: 0.7, 8: 0.75})
    run(tiny, tmp_path, evaluate, early_stopping_patience=2)
    again = run(tiny, tmp_path, Scripted({}), resume=True, early_stopping_patience=2)
    assert again.step == 8
    assert torch.equal(final_weights(tmp_path), evaluate.seen[4])


def test_a_metric_that_the_validation_does_not_give_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"best_metric=recall is none.*\['auroc'\]"):
        run(tiny, tmp_path, Scripted({2: 0.5}), best_metric="recall")


def test_a_best_metric_without_a_validation_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="needs a validation"):
        run(tiny, tmp_path, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": None, "early_stopping_patience": 2}, "needs training.best_metric"),
        ({"evaluate_every": None}, "needs training.evaluate_every"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be positive"),
        ({"layer_decay": 1.5}, "layer_decay"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_not_a_number_is_never_better_and_small_gains_do_not_count(tmp_path):
    settings = arguments(tmp_path, early_stopping_patience=3, early_stopping_min_improvement=0.05)
    progress = judge([(1, math.nan), (2, 0.5), (3, 0.54), (4, math.nan), (5, 0.5)], settings)
    assert (progress.best_step, progress.num_without_improvement, progress.should_stop) == (2, 3, True)


def test_validations_are_read_back_up_to_a_step(tmp_path):
    lines = [
        {"step": 2, "validation_auroc": 0.5},
        {"step": 2, "loss": 1},
        {"step": 4, "validation_auroc": None},
        {"step": 6, "validation_auroc": 0.7},
    ]
    cut_off = '{"step": 4, "validation_au'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut_off)
    found = read_validations(tmp_path / "metrics.jsonl", "auroc", 4)
    assert found[0] == (2, 0.5)
    assert found[1][0] == 4
    assert math.isnan(found[1][1])
    assert len(found) == 2
