"""The bank: vectors made once, refused with another model; annotation finds the planted concept and its place."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.data.concepts.index import Concept
from medclip_hf.evaluation.concept_bank import ConceptBank, annotate_image, build_concept_bank, hot_box
from medclip_hf.evaluation.encoders import ImageEmbeddings, make_encoder
from medclip_hf.evaluation.zero_shot import zero_shot_scores
from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = [
    Concept(f"C{number:07d}", name)
    for number, name in enumerate(["pleural effusion", "mass", "cyst", "cardiomegaly", "rib fracture", "mass of rib"])
]


def conceptclip_encoder(seed=0, has_patch_heads=True):
    tokenizer = train_wordpiece_tokenizer([concept.name for concept in VOCABULARY] * 3, vocab_size=200, max_length=16)
    torch.manual_seed(seed)
    config = ConceptCLIPConfig(
        text_config=BertConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **TOWER).to_dict(),
        vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **TOWER).to_dict(),
        use_patch_concept_alignment=has_patch_heads,
    )
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    return make_encoder(ConceptCLIPModel(config), processor, name="tiny")


@pytest.fixture(scope="module")
def encoder():
    return conceptclip_encoder()


@pytest.fixture(scope="module")
def bank(encoder):
    return build_concept_bank(encoder, VOCABULARY)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def test_the_vectors_are_those_of_the_names(encoder, bank):
    assert bank.names == tuple(concept.name for concept in VOCABULARY)
    expected = encoder.encode_classes(["cyst"], ["{}"])
    torch.testing.assert_close(bank.text_embeds[2], expected.text_embeds[0, 0])
    torch.testing.assert_close(bank.concept_embeds[2], expected.concept_embeds[0, 0])


def test_scores_are_the_zero_shot_probabilities_of_the_best_patch(encoder, bank, picture):
    hits = annotate_image(picture, bank, encoder, top_k=100)
    found = encoder.encode_images([picture])
    expected = zero_shot_scores(
        found.image_embeds,
        bank.text_embeds,
        encoder.logit_scale,
        found.patch_embeds,
        bank.concept_embeds,
        encoder.concept_logit_scale,
        logit_bias=encoder.logit_bias,
        concept_logit_bias=encoder.concept_logit_bias,
        activation="sigmoid",
        top_patches=1,
    )
    assert [hit.score for hit in hits] == sorted(expected.mixed_scores[0].tolist(), reverse=True)
    for hit in hits:
        column = bank.names.index(hit.name)
        assert hit.concept_id == bank.concept_ids[column]
        assert hit.local_score == pytest.approx(expected.local_scores[0, column])
        assert hit.global_score == pytest.approx(expected.global_scores[0, column])


def test_a_planted_concept_is_found_at_its_place(encoder, bank, picture, monkeypatch):
    patches = torch.nn.functional.normalize(torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    patches[0, 6] = bank.concept_embeds[3]  # row 1, column 2 of 4 × 4
    planted = ImageEmbeddings(bank.text_embeds[3:4], torch.ones(1), patches)
    monkeypatch.setattr(type(encoder), "encode_pixels", lambda self, pixels: planted)
    [hit] = annotate_image(picture, bank, encoder, top_k=1, region_threshold=0.95)
    assert hit.name == "cardiomegaly"
    assert hit.box == (40, 15, 60, 30)
    assert hit.concept_map.shape == (4, 4)
    assert "concept_map" not in hit.as_dict()
    json.dumps(hit.as_dict())


def test_a_shortlist_that_holds_all_changes_nothing_and_a_short_one_gives_the_same_scores(encoder, bank, picture):
    full = annotate_image(picture, bank, encoder, top_k=6)
    assert [hit.as_dict() for hit in annotate_image(picture, bank, encoder, top_k=6, shortlist=6)] == [
        hit.as_dict() for hit in full
    ]
    by_name = {hit.name: hit for hit in full}
    short = annotate_image(picture, bank, encoder, top_k=6, shortlist=2)
    assert len(short) == 2
    for hit in short:
        assert hit.score == pytest.approx(by_name[hit.name].score)
        assert hit.box == by_name[hit.name].box


def test_a_model_without_patch_heads_gives_scores_without_places(picture):
    encoder = conceptclip_encoder(has_patch_heads=False)
    bank = build_concept_bank(encoder, VOCABULARY)
    hit = annotate_image(picture, bank, encoder, top_k=1)[0]
    assert (hit.box, hit.local_score) == (None, None)
    assert hit.score == hit.global_score


def test_a_saved_bank_is_the_same_and_refused_by_another_model(encoder, bank, picture, tmp_path):
    folder = bank.save(tmp_path / "bank")
    loaded = ConceptBank.load(folder, encoder)
    assert (
        annotate_image(picture, loaded, encoder, top_k=1)[0].as_dict()
        == annotate_image(picture, bank, encoder, top_k=1)[0].as_dict()
    )
    other = conceptclip_encoder(seed=1)
    with pytest.raises(ValueError, match="made with another model"):
        ConceptBank.load(folder, other)
    with pytest.raises(ValueError, match="made with another model"):
        annotate_image(picture, bank, other)


def test_a_damaged_bank_is_refused(encoder, bank, tmp_path):
    folder = bank.save(tmp_path / "bank")
    tensors = folder / "concept_bank.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match="Build it again"):
        ConceptBank.load(folder, encoder)
    with pytest.raises(ValueError, match="Build it again"):
        ConceptBank.load(tmp_path, encoder)


def test_vectors_of_one_vocabulary_do_not_pass_under_the_names_of_another(encoder, bank, tmp_path):
    folder = bank.save(tmp_path / "bank")
    build_concept_bank(encoder, VOCABULARY[::-1]).save(tmp_path / "other")
    (tmp_path / "other" / "concept_bank.safetensors").replace(folder / "concept_bank.safetensors")
    with pytest.raises(ValueError, match="Build it again"):
        ConceptBank.load(folder, encoder)


def test_names_that_do_not_fit_are_set_aside_and_the_rest_kept(encoder):
    long = Concept("C1", "mass of rib " * 40)
    again = Concept("C0000001", "tumour")
    bank = build_concept_bank(encoder, [*VOCABULARY, long, again])
    assert len(bank) == len(VOCABULARY)
    assert {(drop.reason, drop.row_id) for drop in bank.set_aside} == {
        ("name cannot be embedded", "C1"),
        ("identifier repeated", "C0000001"),
    }
    with pytest.raises(ValueError, match="can be embedded"):
        build_concept_bank(encoder, [long])
    with pytest.raises(ValueError, match="no concept"):
        build_concept_bank(encoder, [])
    with pytest.raises(ValueError, match="template"):
        build_concept_bank(encoder, VOCABULARY, templates=["no slot"])


def test_two_concepts_may_share_a_name(encoder):
    bank = build_concept_bank(encoder, [Concept("C1", "mass"), Concept("C2", "mass")])
    assert bank.concept_ids == ("C1", "C2")
    torch.testing.assert_close(bank.text_embeds[0], bank.text_embeds[1])


def test_vectors_that_are_not_finite_are_refused_and_not_ranked_first(encoder, bank, picture, monkeypatch):
    broken = ImageEmbeddings(torch.full((1, 16), torch.nan), torch.ones(1), torch.zeros(1, 16, 16))
    monkeypatch.setattr(type(encoder), "encode_pixels", lambda self, pixels: broken)
    with pytest.raises(ValueError, match="not finite"):
        annotate_image(picture, bank, encoder)


def test_the_box_holds_the_peaks_component_alone():
    values = np.zeros((4, 4), np.float32)
    values[0, 0:2] = (1.0, 0.8)
    values[3, 3] = 0.9
    assert hot_box(values, (40, 80)) == (0, 0, 20, 20)
    assert hot_box(np.full((4, 4), 0.3, np.float32), (40, 80)) == (0, 0, 40, 80)


def test_senseless_options_and_unreadable_images_are_refused(encoder, bank, picture, tmp_path):
    for options in ({"top_k": 0}, {"local_weight": 1.5}, {"shortlist": 0}):
        with pytest.raises(ValueError, match="top_k"):
            annotate_image(picture, bank, encoder, **options)
    with pytest.raises(ValueError, match="region_threshold"):
        annotate_image(picture, bank, encoder, region_threshold=0.0)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.png"):
        annotate_image(tmp_path / "broken.png", bank, encoder)
