import importlib.util

import pytest
import torch

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
from medclip_hf.training import checkpoints, sharded
from medclip_hf.training.arguments import RunArguments
from medclip_hf.training.checkpoints import RunState
from medclip_hf.training.launch import make_accelerator
from medclip_hf.training.optimization import make_optimizer


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("consolidate", repository / "scripts" / "consolidate_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny ConceptCLIP after no step, in shards, and the model."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = ConceptCLIPConfig(
        text_config=sizes | {"vocab_size": 50, "max_position_embeddings": 10},
        vision_config=sizes | {"image_size": 12, "patch_size": 4},
    )
    model, arguments = ConceptCLIPModel(config), RunArguments(output_dir=str(tmp_path), max_steps=1)
    accelerator = make_accelerator(arguments)
    writer, state = sharded.ShardWriter(accelerator), RunState(7, 10, 1, {})
    optimizer = make_optimizer(model, arguments)
    folder = checkpoints.save_checkpoint(tmp_path, state, model, optimizer, accelerator, writer=writer)
    checkpoints.finish_checkpoint(writer, folder, accelerator)
    return folder, model


def test_the_model_loads_with_the_weights_of_the_checkpoint(script, checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    assert script.main([str(folder), str(tmp_path / "model")]) == 0
    assert "the model after step 7" in capsys.readouterr().out
    loaded = ConceptCLIPModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_consolidated_is_refused_in_a_sentence(script, checkpoint, tmp_path, capsys):
    folder, _ = checkpoint
    assert script.main([str(tmp_path / "nothing"), str(tmp_path / "model")]) == 2
    assert "cannot be resumed: it has no manifest.json" in capsys.readouterr().err
    assert script.main([str(folder), str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
