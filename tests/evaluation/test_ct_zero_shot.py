"""Zero-shot scores of CT scans: the official values, the windows of both protocols, and the resumable table."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer

from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    RAD_CHESTCT_TO_CT_RATE,
    Finding,
    FindingEmbeddings,
    Window,
    cut_window,
    embed_findings,
    embed_scan,
    finding_probabilities,
    plan_windows,
    published_operating_point,
    score_scan,
    score_to_csv,
)
from medclip_hf.hub.convert_fvlm import from_official_state_dict
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel

ROI = (32, 64, 96)


@pytest.fixture(scope="module")
def official(goldens):
    """(official tiny model converted, its reference scan and values)."""
    weights = load_file(goldens / "fvlm_model_tiny.safetensors")
    settings = json.loads((goldens / "fvlm_model_tiny.config.json").read_text())["bert"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = FVLMConfig(
        text_config={name: settings[name] for name in (*names, "max_position_embeddings")},
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "image_size_dhw": (32, 48, 96),
        },
    )
    model = FVLMModel(config).eval()
    model.load_state_dict(from_official_state_dict({k[3:]: v for k, v in weights.items() if k[:3] == "sd."})[0])
    return model, load_file(goldens / "fvlm_zeroshot.safetensors")


def test_windows_are_those_of_the_release(official):
    _, reference = official
    volume, mask = reference["in.volume"][0], reference["in.seg"][0]
    windows = {window.anatomies: window for window in plan_windows(mask.numpy(), 4, "published", ROI)}
    assert windows[(0,)] == Window((2, 0, 2), (34, 64, 103), (0,))  # larger than the window, one plane short
    assert set(windows) == {(0,), (1,), (3,)}  # no esophagus
    for index, anatomy in ((0, "lung"), (1, "heart"), (3, "aorta")):
        pixels, window_mask = cut_window(volume, mask, windows[(index,)], (16, 16, 32))
        assert torch.equal(window_mask == index + 1, reference[f"{anatomy}.window_mask"][0] > 0)
        if f"{anatomy}.window_image" in reference:
            assert torch.equal(pixels, reference[f"{anatomy}.window_image"][0])


def test_probabilities_are_those_of_the_release(official):
    model, reference = official
    keys = sorted(key.removeprefix("text_feat.") for key in reference if key.startswith("text_feat."))
    findings = tuple(Finding(key.split("|")[1], key.split("|")[0], "", "") for key in keys)
    anatomies = list(model.config.anatomies)
    prompts = FindingEmbeddings(
        findings,
        torch.tensor([anatomies.index(finding.anatomy) for finding in findings]),
        torch.stack([reference[f"text_feat.{key}"] for key in keys]),
    )
    volume, mask = reference["in.volume"][0], reference["in.seg"][0]
    scores = score_scan(model, volume, mask, prompts, window_size_dhw=ROI)
    assert np.isnan(scores.pop("Hiatal hernia"))
    for finding in findings:
        if finding.name in scores:
            expected = reference[f"probs.{finding.anatomy}|{finding.name}"][0, 1].item()
            assert scores[finding.name] == pytest.approx(expected, abs=1e-5)
    embeds = embed_scan(model, volume, mask, window_size_dhw=ROI)
    for index, anatomy in ((0, "lung"), (1, "heart"), (3, "aorta")):
        torch.testing.assert_close(embeds[index], reference[f"{anatomy}.image_feat"][0], rtol=0, atol=1e-5)


# Windows ---------------------------------------------------------------------------------------------------------


def cuboids(shape, *boxes):
    """A mask with one anatomy for each ((first, last), ...) box."""
    mask = np.zeros(shape, np.uint8)
    for index, box in enumerate(boxes):
        mask[tuple(slice(first, last + 1) for first, last in box)] = index + 1
    return mask


def test_shared_windows_hold_every_anatomy_whole_and_once():
    mask = cuboids((40, 40, 60), [(2, 30)] * 2 + [(5, 40)], [(5, 9), (5, 9), (10, 14)], [(33, 38), (34, 38), (50, 58)])
    windows = plan_windows(mask, 3, "shared", (32, 32, 40))
    assert [window.anatomies for window in windows] == [(0, 1), (2,)]
    for window in windows:
        inside = tuple(slice(s, s + n) for s, n in zip(window.start_dhw, window.size_dhw, strict=True))
        for anatomy in window.anatomies:
            assert (mask[inside] == anatomy + 1).sum() == (mask == anatomy + 1).sum()


def test_a_shared_window_grows_to_hold_a_large_anatomy():
    mask = cuboids((40, 40, 60), [(2, 36), (0, 39), (2, 59)], [(3, 4), (3, 4), (3, 4)])
    assert plan_windows(mask, 2, "shared", (16, 16, 32)) == [Window((2, 0, 2), (35, 40, 58), (0, 1))]


def test_windows_that_coincide_are_embedded_once():
    mask = cuboids((8, 8, 8), [(1, 2)] * 3, [(4, 6)] * 3)
    for protocol in ("published", "shared"):
        assert plan_windows(mask, 2, protocol, (8, 8, 8)) == [Window((0, 0, 0), (8, 8, 8), (0, 1))]
    assert len(plan_windows(mask, 2, "published", (4, 4, 4))) == 2


def test_a_scan_without_anatomy_has_no_window():
    assert plan_windows(np.zeros((8, 8, 8), np.uint8), 4) == []


@pytest.mark.parametrize(
    ("mask", "protocol", "message"),
    [
        (np.zeros((8, 8), np.uint8), "published", "must be a volume"),
        (np.zeros((8, 8, 8)), "published", "integer ids, but float64"),
        (np.ones((8, 8, 8), np.uint8), "fast", "'published' or 'shared', but 'fast' came"),
    ],
)
def test_windows_cannot_be_planned_for_anything_else(mask, protocol, message):
    with pytest.raises(ValueError, match=message):
        plan_windows(mask, 4, protocol)


# Scores ----------------------------------------------------------------------------------------------------------


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "not", "cardiomegaly", "nodule", "."]
FINDINGS = (
    Finding("Lung nodule", "lung", "Not Nodule.", "Nodule."),
    Finding("Cardiomegaly", "heart", "Not Cardiomegaly.", "Cardiomegaly."),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = FVLMConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size_dhw": (8, 8, 8), "patch_size_dhw": (4, 4, 4)},
        anatomies=("lung", "heart"),
        feature_layers=(),
        projection_dim=12,
    )
    return FVLMModel(config).eval()


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def scan(seed=0):
    mask = torch.from_numpy(cuboids((8, 12, 12), [(1, 4), (1, 4), (1, 4)], [(3, 5), (6, 9), (6, 9)]))
    return torch.rand(8, 12, 12, generator=torch.Generator().manual_seed(seed)), mask


def test_prompts_pair_absent_with_present(model, tokenizer):
    embedded = embed_findings(model, tokenizer, FINDINGS)
    assert embedded.text_embeds.shape == (2, 2, 12)
    assert embedded.anatomy_index.tolist() == [0, 1]
    tokens = tokenizer(["Cardiomegaly."], return_tensors="pt", return_token_type_ids=False)
    torch.testing.assert_close(model(**tokens).text_embeds[0], embedded.text_embeds[1, 1])


def test_findings_of_unknown_anatomies_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"findings of \['aorta', 'esophagus'\]"):
        embed_findings(model, tokenizer)


def test_a_probability_is_the_softmax_over_both_prompts():
    embeds = torch.tensor([[[1.0, 0.0], [torch.nan, torch.nan]]])
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    probabilities = finding_probabilities(embeds, prompts, torch.tensor([0, 1]), 2.0)
    assert probabilities[0, 0].item() == pytest.approx(1 / (1 + np.exp(2)))
    assert torch.isnan(probabilities[0, 1])


def test_both_protocols_give_the_same_scores_where_one_window_holds_all(model, tokenizer):
    findings = embed_findings(model, tokenizer, FINDINGS)
    scores = [
        score_scan(model, *scan(), findings, protocol=protocol, window_size_dhw=(8, 12, 12))
        for protocol in ("published", "shared")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_an_anatomy_scores_alike_whichever_others_share_its_window(model, tokenizer):
    findings = embed_findings(model, tokenizer, FINDINGS)
    volume, mask = scan()
    together = score_scan(model, volume, mask, findings, window_size_dhw=(8, 12, 12))
    for anatomy, finding in enumerate(FINDINGS, start=1):
        alone = score_scan(model, volume, torch.where(mask == anatomy, mask, 0), findings, window_size_dhw=(8, 12, 12))
        assert alone[finding.name] == pytest.approx(together[finding.name], abs=1e-6)


def test_volume_and_mask_of_two_grids_are_refused(model):
    volume, mask = scan()
    with pytest.raises(ValueError, match="on one grid"):
        embed_scan(model, volume, mask[1:])
    with pytest.raises(ValueError, match="without the channel"):
        embed_scan(model, volume[None], mask[None])


# Table -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_scored_into_a_table_that_can_be_continued(model, tokenizer, tmp_path):
    findings = embed_findings(model, tokenizer, FINDINGS)
    path, loaded = tmp_path / "scores.csv", []

    def loader(name, fails=False):
        def load():
            loaded.append(name)
            if fails:
                raise ValueError("images[0] holds NaN\nor infinite voxels")
            return scan(len(name))

        return name, load

    scans = [loader("a"), loader("bb", fails=True), loader("ccc")]
    assert score_to_csv(path, scans, model, findings) == {"scored": 2, "refused": 1, "found": 0}
    whole = path.read_text()
    rows = list(csv.DictReader(path.open()))
    assert rows[1]["refused"] == "images[0] holds NaN or infinite voxels"
    expected = score_scan(model, *scan(3), findings)
    assert float(rows[2]["Cardiomegaly"]) == pytest.approx(expected["Cardiomegaly"], abs=1e-6)

    path.write_text(whole[: whole.rindex("ccc") + 6])  # killed while it wrote the last line
    loaded.clear()
    assert score_to_csv(path, scans, model, findings) == {"scored": 1, "refused": 0, "found": 2}
    assert loaded == ["ccc"]
    assert path.read_text() == whole


def test_a_table_of_other_findings_is_not_continued(model, tokenizer, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("scan_id,refused,Emphysema\n")
    with pytest.raises(ValueError, match="same findings"):
        score_to_csv(path, [], model, embed_findings(model, tokenizer, FINDINGS))


# Tables and published figures --------------------------------------------------------------------------------------


def test_the_tables_hold_the_published_findings_and_prompts():
    by_name = {finding.name: finding for finding in CT_RATE_FINDINGS}
    assert len(by_name) == 16
    assert by_name["Atelectasis"] == Finding("Atelectasis", "lung", "Not Atelectatic.", "Atelectatic.")
    assert by_name["Pulmonary fibrotic sequela"].present == "Pulmonary fibrotic."
    assert by_name["Cardiomegaly"].absent == "Not Cardiomegaly."
    counts = {anatomy: sum(f.anatomy == anatomy for f in CT_RATE_FINDINGS) for anatomy in FVLMConfig().anatomies}
    assert counts == {"lung": 11, "heart": 3, "esophagus": 1, "aorta": 1}
    mapped = {name for names in RAD_CHESTCT_TO_CT_RATE.values() for name in names}
    assert by_name.keys() - mapped == {"Mosaic attenuation pattern"}
    assert mapped <= by_name.keys()


def test_the_operating_point_is_the_threshold_nearest_to_the_corner():
    scores = np.array([0.1, 0.2, 0.35, 0.4, np.nan, 0.8, 0.9, 0.3])
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    point = published_operating_point(scores, labels)
    # 0.2 to 0.3 finds all positives and one of four negatives; 0.35 to 0.4 three of four positives alone, as near
    assert point.threshold == pytest.approx(39 / 99)
    assert (point.sensitivity, point.specificity, point.precision) == (0.75, 1.0, 1.0)
    assert point.accuracy == 7 / 8
    assert point.weighted_f1 == pytest.approx((6 / 7 + 8 / 9) / 2)


def test_an_operating_point_needs_both_classes():
    with pytest.raises(ValueError, match="one class only"):
        published_operating_point(np.array([0.1, 0.2]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        published_operating_point(np.array([0.1, 0.2]), np.array([1, 1, 0]))
