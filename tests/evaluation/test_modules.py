"""Our figures through the `evaluate` library: loaded from their folder, without a network, equal to our own."""

import numpy as np
import pytest
import torch

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.modules import MODULES, module_path
from medclip_hf.evaluation.retrieval import retrieval_recall

evaluate = pytest.importorskip("evaluate")


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    def refuse(*_args, **_options):
        raise OSError("a test must not reach the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", refuse)
        patch.setattr("socket.socket.connect", refuse)
        patch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield


def load(name, configuration=None, folder=None):
    options = {} if folder is None else {"cache_dir": str(folder)}
    return evaluate.load(module_path(name), configuration, **options)


def test_batches_of_findings_give_our_figures(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random((40, 2)) < 0.4
    scores, patients = rng.random((40, 2)), [f"p{k // 2}" for k in range(40)]
    metric = load("patient_classification", "multilabel", tmp_path)
    for rows in (slice(0, 25), slice(25, 40)):
        metric.add_batch(predictions=scores[rows], references=labels[rows].astype(int))
    result = metric.compute(class_names=["cyst", "nodule"], groups=patients, num_resamples=20)
    expected = classification_figures(scores, labels, ["cyst", "nodule"], groups=patients, num_resamples=20)
    assert result["details"] == expected.as_dict()
    assert (result["auroc"], result["auroc_low"]) == (expected.overall["auroc"].value, expected.overall["auroc"].low)


def test_one_class_per_sample_is_the_default_and_a_class_without_positives_is_named(tmp_path):
    metric = load("patient_classification", folder=tmp_path)
    result = metric.compute(predictions=np.eye(3)[[0, 1, 0, 1]], references=[0, 1, 0, 1], num_resamples=5)
    assert (result["accuracy"], result["auroc"]) == (1.0, 1.0)
    assert result["undefined"] == {"class 2": "no positive sample"}


def test_recall_with_several_texts_of_an_image_is_ours(tmp_path):
    rng = np.random.default_rng(0)
    owner = np.array([0, 0, 1, 2, 2])
    images, texts = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    metric = load("retrieval_recall", folder=tmp_path)
    result = metric.compute(predictions=images[owner], references=texts, image_ids=list("aabcc"), ks=[1, 2])
    tensors = [torch.from_numpy(table) for table in (images, texts, owner)]
    assert result == pytest.approx(retrieval_recall(*tensors[:2], [1, 2], text_to_image=tensors[2]))


def test_every_module_has_a_card_with_what_it_takes():
    for name in MODULES:
        path = module_path(name)
        with open(f"{path}/README.md", encoding="utf-8") as card:  # noqa: PTH123
            assert card.read().startswith("---\ntitle:")
    with pytest.raises(ValueError, match="there are patient_classification"):
        module_path("accuracy")
