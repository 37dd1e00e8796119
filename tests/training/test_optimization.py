import pytest
import torch

from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.optimization import is_decayed, learning_rate_at, make_optimizer


def arguments(**values):
    return RunArguments(output_dir="unused", **{"max_steps": 100} | values)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.norm = torch.nn.LayerNorm(2)
        self.logit_scale = torch.nn.Parameter(torch.ones(1))
        self.anatomy_bias = torch.nn.Parameter(torch.ones(2, 3))


def test_matrices_alone_decay():
    decayed = {name for name, parameter in Small().named_parameters() if is_decayed(name, parameter)}
    assert decayed == {"linear.weight"}


def test_groups_hold_every_trainable_parameter_once():
    model = Small()
    model.linear.bias.requires_grad_(False)
    decaying, exempt = make_optimizer(model, arguments()).param_groups
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.2, 0.0)
    assert (len(decaying["params"]), len(exempt["params"])) == (1, 4)


def test_decay_can_apply_to_everything():
    (group,) = make_optimizer(Small(), arguments(decay_norms_and_biases=True, weight_decay=0.01)).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (6, 0.01)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(Small().requires_grad_(False), arguments())


def test_one_kernel_updates_all_parameters_as_a_loop_over_them_would():
    torch.manual_seed(0)
    fused, plain = Small(), Small()
    plain.load_state_dict(fused.state_dict())
    optimizer = make_optimizer(fused, arguments(learning_rate=0.1))
    assert optimizer.defaults["fused"] is True
    reference = torch.optim.AdamW(
        [{**group, "fused": False} for group in make_optimizer(plain, arguments(learning_rate=0.1)).param_groups]
    )
    for _ in range(3):
        for model, one in ((fused, optimizer), (plain, reference)):
            sum(parameter.square().sum() for parameter in model.parameters()).backward()
            one.step()
            one.zero_grad()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)


def test_cosine_warms_up_to_the_peak_and_ends_at_the_minimum():
    run = arguments(learning_rate=1.0, warmup_steps=10, max_steps=110, min_learning_rate=0.0)
    rates = [learning_rate_at(step, run, 110, 11) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_cosine_per_epoch_stays_within_an_epoch():
    run = arguments(
        learning_rate=1.0,
        warmup_steps=5,
        warmup_start_learning_rate=0.5,
        min_learning_rate=0.2,
        lr_schedule="cosine_per_epoch",
        max_steps=None,
        num_epochs=4,
    )
    rates = [learning_rate_at(step, run, 40, 10) for step in (0, 4, 5, 9, 10, 19, 20)]
    half_way = 0.2 + 0.8 * (1 + 2**-0.5) / 2
    assert rates == pytest.approx([0.6, 1.0, 1.0, 1.0, half_way, half_way, 0.6])


def test_constant_stays():
    run = arguments(learning_rate=0.3, lr_schedule="constant", warmup_steps=1)
    assert {learning_rate_at(step, run, 100, 10) for step in (0, 1, 50, 99)} == {0.3}
