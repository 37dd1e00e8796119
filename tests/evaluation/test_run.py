"""Protocols from pictures to figures on drawn data whose construction predicts the figure; caches; several models."""

import dataclasses
import logging
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from medclip_hf.evaluation import comparisons, results
from medclip_hf.evaluation.embedding_cache import (
    PatchQuestion,
    ShardCache,
    embed_images,
    embed_texts,
    encode_in_batches,
)
from medclip_hf.evaluation.encoders import Encoder, ImageEmbeddings
from medclip_hf.evaluation.results import (
    StoredResult,
    compare_models,
    data_fingerprint,
    describe,
    load_result,
    save_result,
)
from medclip_hf.evaluation.run import EvaluationSettings, evaluate_task
from medclip_hf.evaluation.task_data import ImageItem, TaskData
from medclip_hf.evaluation.tasks import Task
from medclip_hf.evaluation.zero_shot import ClassEmbeddings

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = tuple(COLOURS)
QUICK = EvaluationSettings(num_resamples=20)


def vector(text):
    return torch.tensor([float(name in text) for name in NAMES])


def colour_encoder(name="colours", turn=0, has_patches=False, noise=0.0, seed=0):
    """A model that sees the mean colour and reads colours; `turn` mixes them up, `noise` blinds it."""

    def forward_pixels(pixel_values):
        patches = pixel_values.flatten(2).transpose(1, 2)  # every pixel is a patch
        pooled = patches.mean(dim=1).roll(turn, dims=1)
        generator = torch.Generator().manual_seed(seed + int(pixel_values.sum() * 1000) % 2**31)
        pooled = pooled + noise * torch.randn(pooled.shape, generator=generator)
        embeds = torch.nn.functional.normalize(pooled, dim=1)
        unit = torch.nn.functional.normalize(patches + 1e-6, dim=2) if has_patches else None
        return ImageEmbeddings(embeds, pooled.norm(dim=1), unit)

    def forward_texts(texts):
        return torch.nn.functional.normalize(torch.stack([vector(text) for text in texts]) + 1e-3, dim=1)

    def forward_classes(names, templates):
        embeds = torch.stack([forward_texts([pattern.format(name) for name in names]) for pattern in templates])
        return ClassEmbeddings(tuple(names), tuple(templates), embeds, embeds)

    return Encoder(
        name=name,
        identity=f"{name} {turn} {has_patches} {noise} {seed}",
        device=torch.device("cpu"),
        dtype=torch.float32,
        logit_scale=10.0,
        logit_bias=-5.0,
        concept_logit_scale=10.0 if has_patches else None,
        concept_logit_bias=-5.0 if has_patches else 0.0,
        num_patches=16 if has_patches else 0,
        preprocess=lambda image: torch.tensor(np.asarray(image.convert("RGB")) / 255.0).float().permute(2, 0, 1),
        forward_pixels=forward_pixels,
        forward_texts=forward_texts,
        forward_classes=forward_classes if has_patches else None,
    )


def item(name, pixels):
    picture = pixels if isinstance(pixels, bytes) else encoded(pixels)
    return ImageItem(name, f"{len(picture)}:{hash(picture)}", lambda: picture)


def encoded(pixels):
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(colour, seed):
    rng = np.random.default_rng(seed)
    return np.clip(np.full((4, 4, 3), colour) * 0.8 + rng.integers(0, 50, (4, 4, 3)), 0, 255)


@pytest.fixture
def single_label():
    labels = np.arange(30) % 3
    items = tuple(item(f"{k}.png", shade(COLOURS[NAMES[label]], k)) for k, label in enumerate(labels))
    return TaskData(items, "test", NAMES, labels, patients=np.array([f"p{k // 2}" for k in range(30)]))


@pytest.fixture
def multi_label():
    """One pixel of each colour that is present, on grey."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 3)).astype(bool)
    items = []
    for k, row in enumerate(labels):
        pixels = np.full((4, 4, 3), rng.integers(100, 200))
        for column, name in enumerate(NAMES):
            if row[column]:
                pixels[column, 1] = COLOURS[name]
        items.append(item(f"{k}.png", pixels))
    return TaskData(tuple(items), "test", NAMES, labels)


def zero_shot_task(**changes):
    return Task(name="colours", title="colours", task_type="zero_shot_classification", class_names=NAMES, **changes)


def auroc(result):
    return result.figures["overall"]["auroc"]["value"]


# Figures that the construction predicts.


def test_a_model_that_sees_the_class_reaches_1(single_label):
    result = evaluate_task(colour_encoder(), zero_shot_task(), single_label, QUICK)
    assert auroc(result) == 1.0
    assert result.figures["overall"]["accuracy"]["value"] == 1.0
    assert (result.figures["num_samples"], result.figures["num_groups"]) == (30, 15)


def test_a_model_that_takes_each_class_for_the_next_is_never_right(single_label):
    result = evaluate_task(colour_encoder(turn=1), zero_shot_task(), single_label, QUICK)
    assert result.figures["overall"]["accuracy"]["value"] == 0.0
    assert auroc(result) < 0.5


def test_a_blind_model_is_near_one_half_and_agrees_with_scikit_learn(single_label):
    many = dataclasses.replace(
        single_label,
        items=tuple(item(f"{k}.png", shade(COLOURS[NAMES[k % 3]], k)) for k in range(300)),
        labels=np.arange(300) % 3,
        patients=None,
    )
    result = evaluate_task(colour_encoder(noise=1e4), zero_shot_task(), many, QUICK)
    assert auroc(result) == pytest.approx(0.5, abs=0.06)
    by_class = [roc_auc_score(result.arrays["labels"] == k, result.arrays["scores"][:, k]) for k in range(3)]
    assert auroc(result) == pytest.approx(np.mean(by_class))


def test_the_local_score_finds_what_is_too_small_for_the_global_one(multi_label):
    task = zero_shot_task(is_multi_label=True)
    settings = dataclasses.replace(QUICK, score="local", top_patches=1)
    result = evaluate_task(colour_encoder(has_patches=True), task, multi_label, settings)
    assert auroc(result) == 1.0
    assert result.other_scores["global"]["auroc"]["value"] < 1.0
    assert set(result.other_scores) == {"global", "mixed"}
    assert result.facts["top_patches"] == 1


def test_a_model_without_patches_is_scored_globally_and_a_local_score_of_it_is_refused(single_label):
    assert evaluate_task(colour_encoder(), zero_shot_task(), single_label, QUICK).facts["score"] == "global"
    with pytest.raises(ValueError, match="no patch heads"):
        evaluate_task(colour_encoder(), zero_shot_task(), single_label, dataclasses.replace(QUICK, score="local"))


def test_unknown_labels_do_not_count(multi_label):
    known = np.ones((40, 3), dtype=bool)
    known[:, 0] = False
    known[0, 0] = True
    data = dataclasses.replace(multi_label, known=known)
    result = evaluate_task(colour_encoder(), zero_shot_task(is_multi_label=True), data, QUICK)
    assert list(result.figures["undefined"]) == ["red"]


def test_several_findings_are_decided_at_thresholds_of_validation_where_it_has_other_images(multi_label):
    task, encoder = zero_shot_task(is_multi_label=True), colour_encoder(has_patches=True)
    settings = dataclasses.replace(QUICK, score="local", top_patches=1)
    validation = dataclasses.replace(multi_label, split="validation")
    chosen = evaluate_task(encoder, task, multi_label, settings, validation=validation).figures
    assert chosen["thresholds"]["chosen_on"] == "validation scores of 40 rows"
    assert chosen["overall"]["balanced_accuracy"]["value"] == 1.0
    patients = np.array([f"p{k}" for k in range(40)])
    of_same_patients = [dataclasses.replace(data, patients=patients) for data in (multi_label, validation)]
    crossed = evaluate_task(encoder, task, of_same_patients[0], settings, validation=of_same_patients[1]).figures
    assert crossed["thresholds"]["chosen_on"] == "the other patients, 5 folds"


def retrieval_data():
    items = tuple(item(f"{k}.png", shade(COLOURS[NAMES[k]], k)) for k in range(3))
    captions = (("a red thing", "red again"), ("a green thing",), ("a blue thing", "blue", "very blue"))
    return TaskData(items, "test", captions=captions)


def retrieval_task():
    return Task(name="colour_captions", title="captions", task_type="retrieval")


def test_retrieval_with_several_captions_reaches_1_and_ks_beyond_the_gallery_are_left_out():
    result = evaluate_task(colour_encoder(), retrieval_task(), retrieval_data(), QUICK)
    assert {name: value["value"] for name, value in result.figures["overall"].items()} == {
        "image_to_text_recall@1": 1.0,
        "text_to_image_recall@1": 1.0,
    }
    assert set(result.figures["left_out"]) == {"recall@5", "recall@10", "recall@50", "recall@200"}
    wrong = evaluate_task(colour_encoder(turn=1), retrieval_task(), retrieval_data(), QUICK)
    assert wrong.figures["overall"]["text_to_image_recall@1"]["value"] == 0.0


# The cache.


def test_embeddings_are_computed_once_and_are_the_same(single_label, tmp_path):
    encoder = colour_encoder(has_patches=True)
    first = evaluate_task(encoder, zero_shot_task(), single_label, QUICK, cache=tmp_path)
    second = evaluate_task(encoder, zero_shot_task(), single_label, QUICK, cache=tmp_path)
    assert (first.facts["num_encoded"], second.facts["num_encoded"]) == (30, 0)
    assert np.array_equal(first.arrays["scores"], second.arrays["scores"])


def test_another_model_other_images_or_other_concepts_are_computed_anew(single_label, tmp_path):
    def encoded_by(encoder, data, task):
        return evaluate_task(encoder, task, data, QUICK, cache=tmp_path).facts["num_encoded"]

    assert encoded_by(colour_encoder(has_patches=True), single_label, zero_shot_task()) == 30
    assert encoded_by(colour_encoder(has_patches=True, seed=1), single_label, zero_shot_task()) == 30
    fewer = dataclasses.replace(
        single_label, items=single_label.items[:9], labels=single_label.labels[:9], patients=None
    )
    assert encoded_by(colour_encoder(has_patches=True), fewer, zero_shot_task()) == 9
    other_words = zero_shot_task(prompt_names=("red", "blue", "green"))
    assert encoded_by(colour_encoder(has_patches=True), single_label, other_words) == 30
    assert encoded_by(colour_encoder(has_patches=True), single_label, zero_shot_task()) == 0


@pytest.mark.parametrize("damage", ["other key", "half a file", "not finite"])
def test_a_shard_that_does_not_fit_is_computed_again_and_said(single_label, tmp_path, caplog, damage):
    from safetensors.torch import save_file

    encoder = colour_encoder()
    expected = embed_images(encoder, single_label, tmp_path)
    (path,) = tmp_path.glob("*/images-00000.safetensors")
    tensors = {"image_embeds": torch.zeros(30, 3), "image_norms": torch.ones(30), "is_readable": torch.ones(30).bool()}
    if damage == "half a file":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "other key":
        save_file(tensors, path, metadata={"key": "another"})
    else:
        tensors["image_embeds"] = tensors["image_embeds"] / 0
        save_file(tensors, path, metadata={"key": path.parent.name})
    with caplog.at_level(logging.WARNING):
        again = embed_images(encoder, single_label, tmp_path)
    assert again.num_computed == 30
    assert torch.equal(again.image_embeds, expected.image_embeds)
    assert "computed again" in caplog.text


def test_a_run_that_broke_off_goes_on_with_the_shard_it_had(single_label, tmp_path, monkeypatch):
    monkeypatch.setattr("medclip_hf.evaluation.embedding_cache.ROWS_PER_SHARD", 10)
    whole = embed_images(colour_encoder(), single_label, tmp_path)
    (second,) = tmp_path.glob("*/images-00001.safetensors")
    second.unlink()
    again = embed_images(colour_encoder(), single_label, tmp_path)
    assert again.num_computed == 10
    assert torch.equal(again.image_embeds, whole.image_embeds)


def fill(folder, number, failures):
    cache = ShardCache(folder, {"model": "one"})
    for _ in range(50):
        cache.save("images-00000", {"x": torch.full((5000,), float(number))})
        found = cache.load("images-00000", 5000)
        if found is None or len(found["x"].unique()) != 1:
            failures.put("half a shard")


def test_two_runs_fill_one_cache_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    runs = [context.Process(target=fill, args=(tmp_path, number, failures)) for number in range(2)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert [one.exitcode for one in runs] == [0, 0]
    assert failures.empty()


def test_the_cache_names_no_file_and_no_patient(single_label, tmp_path):
    embed_images(colour_encoder(), single_label, tmp_path)
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b".png" not in content
    assert b"p1" not in content


def test_images_that_cannot_be_decoded_are_set_aside_also_from_the_cache(single_label, tmp_path):
    items = (item("broken.png", b"\x89PNG\r\n\x1a\nxx"), item("text.png", b"hello"), *single_label.items[2:])
    data = dataclasses.replace(single_label, items=items)
    first = evaluate_task(colour_encoder(), zero_shot_task(), data, QUICK, cache=tmp_path)
    assert [entry.where for entry in first.set_aside] == ["broken.png", "text.png"]
    assert first.figures["num_samples"] == 28
    again = evaluate_task(colour_encoder(), zero_shot_task(), data, QUICK, cache=tmp_path)
    assert [entry.where for entry in again.set_aside] == ["broken.png", "text.png"]
    assert auroc(again) == auroc(first) == 1.0
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        embed_images(colour_encoder(), dataclasses.replace(data, items=items[:2]), None)


def test_loader_workers_change_nothing(single_label):
    alone = embed_images(colour_encoder(), single_label, None, batch_size=7)
    beside = embed_images(colour_encoder(), single_label, None, batch_size=7, num_workers=2)
    assert torch.equal(alone.image_embeds, beside.image_embeds)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost():
    seen = []

    def encode(start, chunk):
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("out of memory")
        seen.extend(zip(range(start, start + len(chunk)), chunk.tolist(), strict=True))

    assert encode_in_batches(torch.arange(10), 8, encode) == 2
    assert seen == [(k, k) for k in range(10)]
    with pytest.raises(torch.OutOfMemoryError):
        encode_in_batches(torch.arange(2), 8, lambda start, chunk: (_ for _ in ()).throw(torch.OutOfMemoryError()))


def test_embeddings_that_are_not_finite_are_refused(single_label):
    broken = dataclasses.replace(
        colour_encoder(), forward_pixels=lambda pixels: ImageEmbeddings(pixels.mean((2, 3)) / 0, pixels.sum((1, 2, 3)))
    )
    with pytest.raises(ValueError, match="not finite"):
        embed_images(broken, single_label, None)
    with pytest.raises(ValueError, match="not finite"):
        embed_texts(
            dataclasses.replace(broken, forward_texts=lambda texts: torch.full((len(texts), 3), torch.nan)), ["a"], None
        )
    with pytest.raises(ValueError, match="no patch heads"):
        embed_images(colour_encoder(), single_label, None, question=PatchQuestion(torch.eye(3), 1))


# Results and comparisons.


def stored(encoder, task, data, folder):
    result = evaluate_task(encoder, task, data, QUICK)
    save_result(folder, describe(encoder, task, data, QUICK, result), result.arrays)
    return load_result(folder, task.name, encoder.name, data_fingerprint(encoder, task, data, QUICK))


def test_a_result_is_found_again_only_if_nothing_changed(single_label, tmp_path):
    task, encoder = zero_shot_task(), colour_encoder(name="a/b: c")
    found = stored(encoder, task, single_label, tmp_path)
    assert found.record["figures"]["overall"]["auroc"]["value"] == 1.0
    assert found.record["data"]["counts"] == {"in use": 30}
    for wanted in (
        data_fingerprint(colour_encoder(name="a/b: c", seed=1), task, single_label, QUICK),
        data_fingerprint(encoder, task, dataclasses.replace(single_label, labels=1 - single_label.labels % 2), QUICK),
        data_fingerprint(encoder, task, single_label, dataclasses.replace(QUICK, score="global")),
        data_fingerprint(encoder, zero_shot_task(templates=("a {}",)), single_label, QUICK),
    ):
        assert load_result(tmp_path, task.name, encoder.name, wanted) is None
    (path,) = tmp_path.glob("*/*.json")
    path.write_text("{")
    assert load_result(tmp_path, task.name, encoder.name, found.record["fingerprint"]) is None


def test_models_are_compared_pair_by_pair_with_holm_s_correction(single_label, tmp_path):
    settings = dataclasses.replace(QUICK, num_resamples=200)
    encoders = [colour_encoder(name="sees"), colour_encoder(name="blind", noise=1e4), colour_encoder(name="also sees")]
    results = {
        "colours": [stored(encoder, zero_shot_task(), single_label, tmp_path) for encoder in encoders],
        "captions": [stored(encoder, retrieval_task(), retrieval_data(), tmp_path) for encoder in encoders],
    }
    compared = compare_models(results, {"colours": single_label.patients, "captions": None}, settings)
    blind = compared["colours: blind against sees, auroc"]
    assert blind["difference"]["value"] < -0.2
    assert blind["p_value"] < blind["p_holm"] <= 1.0
    assert compared["colours: also sees against sees, auroc"]["difference"]["value"] == 0.0
    assert "captions: blind against sees, image_to_text_recall@1" in compared


def scans_result(model, findings, scores, labels):
    record = {"model": model, "figures": {"num_positive": dict.fromkeys(findings, 1), "kind": "multi-label"}}
    return StoredResult(record, {"scores": scores, "labels": labels, "rows": np.arange(len(scores))})


def test_models_that_know_other_findings_are_compared_on_those_of_both():
    labels = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    first = scans_result("three", ("nodule", "effusion", "emphysema"), labels * 0.8, labels)
    second = scans_result("two", ("emphysema", "nodule"), 1.0 - labels[:, [2, 0]], labels[:, [2, 0]])
    third = scans_result("one", ("hernia",), labels[:, :1] * 1.0, labels[:, :1])
    compared = compare_models({"ct": [first, second, third]}, {}, QUICK)
    assert list(compared) == ["ct: two against three, auroc"]
    assert compared["ct: two against three, auroc"]["difference"]["value"] == -1.0


def test_a_model_is_resampled_once_however_many_others_it_is_compared_with(monkeypatch):
    labels = np.array([[1], [0], [1], [0]], dtype=bool)
    models = [scans_result(str(k), ("nodule",), labels * 0.1 * k, labels) for k in range(4)]
    called = []
    monkeypatch.setattr(
        results, "resampled_figures", lambda *given: called.append(1) or comparisons.resampled_figures(*given)
    )
    assert len(compare_models({"ct": models}, {}, QUICK)) == 6
    assert len(called) == 4


def test_tasks_of_other_types_say_what_runs_them(single_label):
    with pytest.raises(ValueError, match=r"run scripts/train_vqa\.py"):
        evaluate_task(colour_encoder(), Task(name="q", title="q", task_type="visual_question_answering"), single_label)


def test_ten_thousand_images_and_a_hundred_classes_are_scored_within_seconds():
    from time import process_time

    from medclip_hf.evaluation.zero_shot import scores_from_cosines

    images = torch.nn.functional.normalize(torch.randn(10_000, 1152), dim=1)
    classes = torch.nn.functional.normalize(torch.randn(100, 1152), dim=1)
    best = torch.rand(10_000, 100)
    seconds = []
    for _ in range(3):  # the best of three, as other work may run beside this
        start = process_time()
        scores = scores_from_cosines(images @ classes.T, 96.6, best, 50.0)
        seconds.append(process_time() - start)
    assert min(seconds) < 4  # 0.1 on an idle machine
    assert scores.mixed_scores.shape == (10_000, 100)
