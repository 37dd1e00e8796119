"""Labelled images and scans: what is read, what a batch says, what rare labels weigh, and what is refused."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPProcessor
from medclip_hf.data.hospital.rows import DatasetFacts, HospitalRow, write_dataset_facts, write_hospital_rows
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.training.classification import (
    UNKNOWN,
    ClassificationObjective,
    FeatureDataset,
    LabelledFigureCollator,
    LabelledFigureDataset,
    check_both_values,
    check_patients_disjoint,
    class_weights,
    run_over_rows,
)

CLASSES = ("effusion", "mass")
NAN = float("nan")


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number, labels, content=None):
    figure = FigureRow(f"row-{number}", "", image_bytes=content or png(20 * number))
    return HospitalRow(figure, f"patient-{number // 2}", "", labels)


@pytest.fixture
def folder(tmp_path):
    rows = [
        row(0, (("effusion", True), ("mass", False))),
        row(1, (("effusion", False),)),
        row(2, (("mass", True), ("effusion", True))),
        row(3, (("mass", False), ("effusion", False)), content=b"no picture"),
    ]
    write_hospital_rows(rows, tmp_path, "train")
    write_dataset_facts(DatasetFacts("figures", "multi_label", CLASSES, {}, {}, {}, {}), tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    return ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 6, "width": 6}), tokenizer)


def test_images_without_captions_are_read_with_their_labels(folder):
    dataset = LabelledFigureDataset(folder, classes=CLASSES, image_size=6, crop_scale=None)
    example = dataset[(0, 1)]
    assert example.image.size == (6, 6)
    np.testing.assert_array_equal(example.labels, [0, NAN])
    assert dataset.patient_ids == ["patient-0", "patient-0", "patient-1", "patient-1"]


def test_an_unreadable_image_is_set_aside_with_its_reason(folder, processor):
    dataset = LabelledFigureDataset(folder, classes=CLASSES, image_size=6, crop_scale=None)
    batch = LabelledFigureCollator(processor, 2, is_single_label=False)([dataset[i] for i in range(4)])
    assert batch["row_ids"] == ["row-0", "row-1", "row-2"]
    assert [row["reason"] for row in batch["set_aside"]] == ["image not recognised"]
    assert batch["labels"].tolist() == [[1, 0], [0, UNKNOWN], [1, 1]]
    assert batch["pixel_values"].shape == (3, 3, 6, 6)


def test_a_row_without_exactly_one_label_is_set_aside_where_one_is_wanted(folder, processor):
    dataset = LabelledFigureDataset(folder, classes=CLASSES, image_size=6, crop_scale=None)
    batch = LabelledFigureCollator(processor, 2, is_single_label=True)([dataset[0], dataset[2]])
    assert batch["labels"].tolist() == [0]
    assert batch["set_aside"] == [
        {"row_id": "row-2", "reason": "not exactly one label", "detail": "2 of the classes are present"}
    ]


@pytest.mark.parametrize("is_single_label", [True, False])
def test_a_batch_of_which_nothing_could_be_read_still_runs(processor, is_single_label):
    batch = LabelledFigureCollator(processor, 2, is_single_label=is_single_label)([Drop("image damaged")])
    linear = torch.nn.Linear(3 * 6 * 6, 2)

    def model(pixel_values):
        return type("Output", (), {"logits": linear(pixel_values.flatten(1))})

    kind = "single_label_classification" if is_single_label else "multi_label_classification"
    objective = ClassificationObjective(kind)
    values = objective.compare(objective.embed(model, batch), batch)
    values["loss"].backward()
    assert values["classification_loss"] == 0
    assert not linear.weight.grad.any()


def test_classes_that_no_row_has_are_refused(folder):
    with pytest.raises(ValueError, match="no row in the split train"):
        LabelledFigureDataset(folder, classes=("fracture",), image_size=6)


def test_a_class_that_all_rows_have_is_refused():
    labels = np.array([[1, 0], [1, 1], [NAN, 0]], dtype=np.float32)
    with pytest.raises(ValueError, match="'effusion': 2 present, 0 absent"):
        check_both_values(labels, CLASSES)
    check_both_values(labels[:, 1:], CLASSES[1:])


def test_a_patient_in_two_splits_is_refused():
    with pytest.raises(ValueError, match="1 patients are in both train and test, such as b"):
        check_patients_disjoint({"train": ["a", "b"], "validation": ["c"], "test": ["b"]})
    check_patients_disjoint({"train": ["a", "a"], "test": ["b"]})


def test_rare_labels_weigh_more_but_not_without_bound():
    labels = np.zeros((100, 2), dtype=np.float32)
    labels[:25, 0], labels[0, 1] = 1, 1
    assert class_weights(labels, "balanced", is_single_label=False).tolist() == [3.0, 20.0]
    one = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    torch.testing.assert_close(class_weights(one, "balanced", is_single_label=True), torch.tensor([4 / 6, 2.0]))
    assert class_weights(labels, "none", is_single_label=False) is None


def objective_loss(objective, logits, labels):
    return objective.compare({"logits": logits}, {"labels": labels})["loss"]


def test_weights_leave_the_best_logits_where_they_are_without():
    """Of 1000 rows 100 have the label: the best constant logit says 0.1, weighted or not."""
    labels = (torch.arange(1000) < 100).long()[:, None]
    for weights in (None, torch.tensor([9.0])):
        logit = torch.zeros(1, 1, requires_grad=True)
        best = torch.optim.LBFGS([logit], max_iter=50)

        def closure(logit=logit, best=best, weights=weights):
            best.zero_grad()
            objective = ClassificationObjective("multi_label_classification", weights)
            loss = objective_loss(objective, logit.expand(1000, 1), labels)
            loss.backward()
            return loss

        best.step(closure)
        assert torch.sigmoid(logit).item() == pytest.approx(0.1, abs=1e-3)


def test_micro_batches_have_the_loss_of_the_batch():
    torch.manual_seed(0)
    objective = ClassificationObjective("multi_label_classification", torch.tensor([2.0, 3.0]))
    logits = torch.randn(5, 2)
    labels = torch.tensor([[1, 0], [0, UNKNOWN], [1, 1], [0, 0], [UNKNOWN, UNKNOWN]])
    parts = objective.split({"labels": labels, "logits": logits, "set_aside": []}, 2)
    assert [len(part["labels"]) for part in parts] == [2, 3]
    expected = F.binary_cross_entropy_with_logits(
        logits + torch.tensor([2.0, 3.0]).log(),
        labels.float(),
        weight=(labels >= 0).float(),
        pos_weight=torch.tensor([2.0, 3.0]),
        reduction="sum",
    )
    torch.testing.assert_close(objective_loss(objective, logits, labels), expected / 7)


def test_features_are_computed_once_in_the_order_of_the_rows(folder, processor):
    dataset = LabelledFigureDataset(folder, classes=CLASSES, image_size=6, crop_scale=None)
    collator = LabelledFigureCollator(processor, 2, is_single_label=False)
    rows, means = run_over_rows(
        dataset,
        collator,
        lambda batch: batch["pixel_values"].mean(dim=(1, 2, 3))[:, None],
        batch_size=2,
        device=torch.device("cpu"),
    )
    assert rows.tolist() == [0, 1, 2]
    assert means[:, 0].diff().gt(0).all()  # each picture is brighter than the one before
    features = FeatureDataset(dataset, rows, means, "image_embeds", is_single_label=False)
    batch = features.collate([features[(3, 2)], 0])
    assert batch["row_ids"] == ["row-2", "row-0"]
    torch.testing.assert_close(batch["image_embeds"], means[[2, 0]])
    assert FeatureDataset(dataset, rows, means, "x", is_single_label=True).targets.tolist() == [0, UNKNOWN, UNKNOWN]


def test_pixels_are_scaled_once_in_training_and_over_all_rows(folder, processor):
    dataset = LabelledFigureDataset(folder, classes=CLASSES, image_size=6, crop_scale=None)
    collator = LabelledFigureCollator(processor, 2, is_single_label=False)
    objective = ClassificationObjective("multi_label_classification")
    examples = [dataset[number] for number in range(3)]

    def model(pixel_values):
        return SimpleNamespace(logits=pixel_values[:, :2, 0, 0])

    def forward(batch):
        return objective.embed(model, batch)["logits"]

    expected = processor(images=[example.image for example in examples], do_resize=False)["pixel_values"][:, :2, 0, 0]
    torch.testing.assert_close(forward(collator(examples)), expected)
    over_rows = run_over_rows(dataset, collator, forward, batch_size=2, device=torch.device("cpu"))[1]
    torch.testing.assert_close(over_rows, expected)


def test_a_split_of_which_nothing_can_be_read_is_refused(tmp_path, processor):
    write_hospital_rows([row(0, (("mass", True),), content=b"no picture")], tmp_path, "train")
    write_dataset_facts(DatasetFacts("figures", "multi_label", ("mass",), {}, {}, {}, {}), tmp_path)
    dataset = LabelledFigureDataset(tmp_path, classes=("mass",), image_size=6, crop_scale=None)
    collator = LabelledFigureCollator(processor, 1, is_single_label=False)
    with pytest.raises(ValueError, match="none of 1 rows"):
        run_over_rows(dataset, collator, lambda batch: batch, batch_size=2, device=torch.device("cpu"))
