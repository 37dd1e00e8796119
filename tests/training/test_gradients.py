import pytest
import torch
from accelerate import Accelerator

from medclip_hf.training.gradients import backward

# autograd warns where a gradient is looked for and cannot be
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("num_micro_batches", [2, 3, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny, accelerator, num_micro_batches):
    batch = tiny.collate([tiny.Numbers()[(0, index)] for index in range(10)])
    gradients = []
    for count in (1, num_micro_batches):
        model = tiny.new_model().double().eval()  # without dropout: whole and parts draw differently
        double = {name: value.double() if torch.is_tensor(value) else value for name, value in batch.items()}
        backward(model, tiny.Matching(), double, count, accelerator)
        gradients.append(gradients_of(model))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_micro_batches_with_dropout_give_the_gradient_of_one_graph_over_the_same_dropout(tiny, accelerator):
    batch = tiny.collate([tiny.Numbers()[(0, index)] for index in range(10)])
    objective = tiny.Matching()

    reference = tiny.new_model().train()
    torch.manual_seed(5)
    parts = [objective.embed(reference, part) for part in objective.split(batch, 3)]
    objective.compare({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, batch)["loss"].backward()
    state_of_one_graph = torch.get_rng_state()

    model = tiny.new_model().train()
    torch.manual_seed(5)
    backward(model, objective, batch, 3, accelerator)

    torch.testing.assert_close(gradients_of(model), gradients_of(reference))
    assert torch.equal(torch.get_rng_state(), state_of_one_graph), "the next step must draw new numbers"


def test_gradients_are_added_to_those_already_there(tiny, accelerator):
    batch = tiny.collate([tiny.Numbers()[(0, index)] for index in range(4)])
    model = tiny.new_model().eval()
    backward(model, tiny.Matching(), batch, 2, accelerator)
    once = gradients_of(model)
    backward(model, tiny.Matching(), batch, 2, accelerator)
    torch.testing.assert_close(gradients_of(model), {name: 2 * gradient for name, gradient in once.items()})
