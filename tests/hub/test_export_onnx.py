"""Exported towers give what the model gives, for batches and text lengths that they were not traced with."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, SiglipVisionConfig

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, FVLMConfig, FVLMModel

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from medclip_hf.hub import export_onnx
from medclip_hf.hub.export_onnx import export_towers, quantize_onnx, run_onnx

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def conceptclip():
    torch.manual_seed(0)
    text = BertConfig(vocab_size=50, max_position_embeddings=32, **TOWER)
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **TOWER)
    return ConceptCLIPModel(ConceptCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()


def fvlm():
    torch.manual_seed(0)
    vision = TOWER | {"image_size_dhw": (4, 8, 8), "patch_size_dhw": (2, 4, 4), "initializer_range": 0.5}
    text = TOWER | {"vocab_size": 50, "max_position_embeddings": 32}
    config = FVLMConfig(vision_config=vision, text_config=text, feature_layers=(0,), pooling_num_attention_heads=2)
    return FVLMModel(config).eval()


@pytest.fixture(scope="module")
def exported_conceptclip(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("onnx"), conceptclip()
    assert max(export_towers(model, folder).values()) < 1e-5
    return folder, model


def test_conceptclip_s_files_give_its_embeddings_and_name_its_scales(exported_conceptclip):
    folder, model = exported_conceptclip
    pixels, ids, mask = torch.randn(5, 3, 16, 16), torch.randint(1, 50, (4, 17)), torch.ones(4, 17, dtype=torch.int64)
    mask[2, 5:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    images = run_onnx(folder / "vision_model.onnx", {"pixel_values": pixels.numpy()})
    texts = run_onnx(folder / "text_model.onnx", {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    facts = json.loads((folder / "export.json").read_text())
    logits = facts["logit_scale"] * images["image_embeds"] @ texts["text_embeds"].T + facts["logit_bias"]
    np.testing.assert_allclose(logits, expected.logits_per_image, atol=1e-4)
    np.testing.assert_allclose(images["patch_embeds"], expected.patch_embeds, atol=1e-5)
    tokens = texts["token_embeds"][0, 3:6].mean(axis=0)  # a concept at tokens 3 to 5
    with torch.no_grad():
        concept = model.get_concept_embeds(ids[:1], mask[:1], concept_token_spans=torch.tensor([[[3, 6]]]))[0, 0]
    np.testing.assert_allclose(tokens / np.linalg.norm(tokens), concept, atol=1e-5)


def test_fvlm_s_files_pool_each_anatomy_and_know_which_is_absent(tmp_path):
    model = fvlm()
    assert max(export_towers(model, tmp_path, size_dhw=(4, 8, 16)).values()) < 1e-5
    volume = torch.rand(1, 1, 4, 8, 16)
    mask = torch.zeros(1, 4, 8, 16, dtype=torch.uint8)
    mask[0, 0, 0, 0], mask[0, 2:, 4:, 8:] = 1, 3
    with torch.no_grad():
        expected = model(pixel_values=volume, anatomy_mask=mask)
    found = run_onnx(tmp_path / "vision_model.onnx", {"pixel_values": volume.numpy(), "anatomy_mask": mask.numpy()})
    assert found["anatomy_present"].tolist() == [[True, False, True, False]]
    np.testing.assert_allclose(found["anatomy_embeds"], expected.anatomy_embeds, atol=1e-5)


def test_int8_files_are_smaller_and_point_the_same_way(exported_conceptclip, tmp_path):
    folder, _ = exported_conceptclip
    quantize_onnx(folder / "text_model.onnx", tmp_path / "text.int8.onnx")
    inputs = {"input_ids": np.arange(1, 13).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    full = run_onnx(folder / "text_model.onnx", inputs)["text_embeds"]
    rounded = run_onnx(tmp_path / "text.int8.onnx", inputs)["text_embeds"]
    assert ((full * rounded).sum(-1) > 0.99).all()
    assert not np.array_equal(full, rounded)


def test_a_file_that_differs_from_the_model_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "_export", lambda tower, path: path.write_bytes(b"made"))
    monkeypatch.setattr(export_onnx, "largest_difference", lambda tower, path: float("nan"))
    with pytest.raises(ValueError, match="differs from the model"):
        export_towers(conceptclip(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float32 on the CPU"):
        export_towers(conceptclip().bfloat16(), tmp_path)
    with pytest.raises(ValueError, match="whole patches"):
        export_towers(fvlm(), tmp_path, size_dhw=(4, 8, 9))
    with pytest.raises(ValueError, match="ConceptCLIP takes pictures"):
        export_towers(conceptclip(), tmp_path, size_dhw=(4, 8, 8))
    with pytest.raises(ValueError, match="expected ConceptCLIPModel or FVLMModel"):
        export_towers(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="export the model first"):
        quantize_onnx(tmp_path / "none.onnx", tmp_path / "out.onnx")
