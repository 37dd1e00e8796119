"""The linear probe: the same classifiers as scikit-learn, honest splits, stratified shares, the script end to end."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

from medclip_hf.evaluation.logistic import fit_softmax
from medclip_hf.evaluation.probe import (
    ProbeSplit,
    fit_probe,
    probe_figures,
    run_linear_probe,
    stratified_subset,
)
from medclip_hf.evaluation.probe_data import load_probe_data


def samples(num_samples=200, num_classes=3, width=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_samples) % num_classes
    return rng.normal(size=(num_samples, width)) + 1.2 * np.eye(num_classes, width)[labels], labels


def split(num_samples=200, seed=0, first_patient=0, num_classes=3):
    features, labels = samples(num_samples, num_classes, seed=seed)
    return ProbeSplit(features, labels, first_patient + np.arange(num_samples) // 2)


@pytest.mark.parametrize("width", [12, 300])  # narrower and wider than there are samples
@pytest.mark.parametrize("num_classes", [2, 3])
def test_probabilities_of_one_class_per_sample_equal_scikit_learn(num_classes, width):
    features, labels = samples(num_classes=num_classes, width=width)
    cs = (0.01, 0.316, 10.0)
    probe = fit_probe(ProbeSplit(features, labels), num_classes, cs, tolerance=1e-9)
    for which, c in enumerate(cs):
        theirs = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(features, labels).predict_proba(features)
        assert probe.probabilities(features, which) == pytest.approx(theirs, abs=2e-6)
        assert probe.is_converged(which)


def test_probabilities_of_several_findings_equal_scikit_learn_on_what_is_known():
    features, _ = samples()
    rng = np.random.default_rng(1)
    labels, known = features[:, :4] + rng.normal(size=(200, 4)) > 1, rng.random((200, 4)) < 0.7
    probe = fit_probe(ProbeSplit(features, labels, known=known), 4, (0.1, 1.0), tolerance=1e-9)
    for which, c in enumerate((0.1, 1.0)):
        for k in range(4):
            rows = known[:, k]
            theirs = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(features[rows], labels[rows, k])
            expected = theirs.predict_proba(features)[:, 1]
            assert probe.probabilities(features, which)[:, k] == pytest.approx(expected, abs=2e-6)


def test_a_fit_that_is_broken_off_says_so():
    features, labels = (torch.from_numpy(array) for array in samples())
    fit = fit_softmax(features, labels, 3, [1e-4, 1e4], tolerance=1e-10, max_steps=5)
    assert not fit.is_converged[1]


def test_a_penalty_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="C must be positive"):
        fit_probe(split(), 3, [0.0])


def test_a_share_keeps_the_share_of_every_class_and_one_of_the_rarest():
    labels = np.array([0] * 700 + [1] * 298 + [2] * 2)
    rows = stratified_subset(labels, 0.1, seed=0)
    counts = np.bincount(labels[rows], minlength=3)
    assert counts.tolist() == [70, 30, 1]
    assert not np.array_equal(rows, stratified_subset(labels, 0.1, seed=1))
    assert np.array_equal(rows, stratified_subset(labels, 0.1, seed=0))


def test_a_share_of_several_findings_has_each_finding_and_whole_patients():
    rng = np.random.default_rng(0)
    labels, patients = rng.random((1000, 5)) < [0.5, 0.2, 0.1, 0.05, 0.004], rng.integers(300, size=1000)
    rows = stratified_subset(labels, 0.1, seed=0, groups=patients)
    assert labels[rows].any(axis=0)[labels.any(axis=0)].all()
    assert set(patients[rows]).isdisjoint(np.delete(patients, rows))
    assert 80 <= len(rows) <= 160


def test_more_training_samples_help_and_all_of_them_are_one_run():
    runs = run_linear_probe(
        split(600), split(200, 1, 1000), split(400, 2, 2000), 3, fractions=(0.02, 1.0), seeds=(0, 1)
    )
    assert [(run.fraction, run.seed) for run in runs] == [(0.02, 0), (0.02, 1), (1.0, 0)]
    assert runs[0].num_train < 20
    assert runs[-1].num_train == 600
    figures = probe_figures(runs, split(400, 2, 2000), ["a", "b", "c"], num_resamples=50)
    assert figures[1.0]["auroc"].mean.value > figures[0.02]["auroc"].mean.value
    assert figures[1.0]["auroc"].deviation is None
    assert figures[0.02]["auroc"].deviation > 0


def test_c_is_the_one_with_the_least_loss_on_validation_not_on_test():
    rng = np.random.default_rng(0)
    noise = ProbeSplit(rng.normal(size=(200, 12)), rng.integers(3, size=200), 1000 + np.arange(200))
    options = {"fractions": (1.0,), "inverse_penalties": (1e-4, 1e4)}
    (by_noise,) = run_linear_probe(split(), noise, split(200, 2, 2000), 3, **options)
    assert by_noise.inverse_penalty == 1e-4  # what says nothing loses least on noise
    (by_signal,) = run_linear_probe(split(), split(200, 1, 1000), split(200, 2, 2000), 3, **options)
    assert by_signal.inverse_penalty == 1e4


def test_a_class_that_no_training_sample_has_gets_probability_zero_and_is_named():
    train = split(num_classes=2)
    (run,) = run_linear_probe(train, None, split(60, 2, 2000), 3, fractions=(1.0,), inverse_penalties=(1.0,))
    assert run.undefined == (2,)
    assert (run.probabilities[:, 2] == 0).all()


def test_a_finding_that_no_training_sample_has_is_in_no_figure():
    features, labels = samples()
    tables = np.stack([labels == 0, labels == 5], axis=1)
    (run,) = run_linear_probe(
        ProbeSplit(features, tables), None, ProbeSplit(features, tables), 2, fractions=(1.0,), inverse_penalties=(1.0,)
    )
    assert run.undefined == (1,)
    assert np.isnan(run.probabilities[:, 1]).all()
    figures = probe_figures([run], ProbeSplit(features, tables), ["cyst", "nodule"], num_resamples=10)
    assert figures[1.0]["auroc"].mean.value > 0.7


def test_splits_that_share_a_patient_are_refused():
    with pytest.raises(ValueError, match="patients of the test split are in the train split too"):
        run_linear_probe(split(), None, split(), 3, inverse_penalties=(1.0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": None}, "to choose C"),
        ({"fractions": (0.0,)}, "fractions in"),
        ({"inverse_penalties": (1.0, 1.0)}, "each C once"),
        ({"num_classes": 2}, "0 to 1"),
        ({"test": ProbeSplit(np.zeros((2, 3)), np.array([0, 1]))}, "other features"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    asked = {"train": split(), "validation": split(50, 1, 1000), "test": split(50, 2, 2000), "num_classes": 3} | change
    with pytest.raises(ValueError, match=message):
        run_linear_probe(**asked)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([[0.0, np.nan], [1.0, 1.0]], np.array([0, 1]), "1 of 2 rows"),
        ([[0.0]], np.array([0, 1]), "N labels"),
        ([[0.0]], np.array([0.5]), "integers"),
        ([[0.0]], np.array([[3]]), "0 or 1"),
    ],
)
def test_bad_features_and_labels_are_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        ProbeSplit(np.array(features), labels)


# --- files and the script


@pytest.fixture
def script(repository):
    spec = importlib.util.spec_from_file_location("linear_probe", repository / "scripts" / "linear_probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    features, labels = samples(300)
    save_file({"image_embeds": features.astype(np.float32)}, tmp_path / "features.safetensors")
    splits = np.array(["train", "val", "test"])[np.arange(300) // 3 % 3]
    rows = [f"p{i // 3},{'xyz'[labels[i]]},{splits[i]},{int(labels[i] == 0)},{'' if i % 4 else 1}" for i in range(300)]
    (tmp_path / "table.csv").write_text("patient,kind,split,cyst,nodule\n" + "\n".join(rows) + "\n", "utf-8")
    return tmp_path


def run_script(script, files, *options):
    given = {"features": "features.safetensors", "table": "table.csv", "output": "out/probe.json"}
    paths = [part for name, path in given.items() for part in (f"--{name}", str(files / path))]
    return script.main([*paths, "--resamples", "20", *options])


def test_the_script_writes_figures_of_every_share(script, files, capsys):
    assert run_script(script, files, "--label", "kind", "--patients", "patient", "--fractions", "0.2,1") == 0
    written = json.loads((files / "out" / "probe.json").read_text("utf-8"))
    assert written["data"]["splits"]["train"] == {"samples": 102, "patients": 34}
    assert len(written["runs"]) == 4
    assert written["figures"]["1.0"]["auroc"]["mean"]["value"] > 0.8
    assert "AUROC" in capsys.readouterr().out


def test_the_published_c_needs_no_validation(script, files):
    assert run_script(script, files, "--label", "kind", "--published-c", "--fractions", "1") == 0
    (run,) = json.loads((files / "out" / "probe.json").read_text("utf-8"))["runs"]
    assert (run["inverse_penalty"], run["validation_log_loss"]) == (0.316, {})


def test_unknown_findings_are_read_as_not_known(files):
    data = load_probe_data(files / "features.safetensors", files / "table.csv", finding_columns=["cyst", "nodule"])
    known = np.concatenate([one.known for one in data.splits.values()])
    assert known[:, 0].all()
    assert known[:, 1].sum() == 75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "colour"], "has no column colour"),
        (["--findings", "cyst,kind"], "row 1, column 'kind'"),
        (["--findings", "cyst,,nodule"], "a column of its own"),
        (["--label", "kind", "--split", "kind"], "row 1: split 'x'"),
        (["--label", "kind", "--c", "0.1,-1"], "C must be positive"),
        (["--label", "kind", "--fractions", "2"], "fractions in (0, 1]"),
    ],
)
def test_a_mistake_of_the_caller_is_one_sentence_and_exit_code_two(script, files, capsys, options, message):
    assert run_script(script, files, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert not (files / "out").exists()


def test_features_and_table_of_different_length_or_kind_are_refused(script, files, capsys):
    (files / "features.safetensors").write_bytes(b"not a file of tensors")
    assert run_script(script, files, "--label", "kind") == 2
    assert "no whole safetensors file" in capsys.readouterr().err
    save_file({"features": np.zeros((3, 2), np.float32)}, files / "features.safetensors")
    assert run_script(script, files, "--label", "kind") == 2
    assert "has 300 rows" in capsys.readouterr().err
    (files / "table.csv").write_bytes(b"kind,split\n\xff\xfe,train\n")
    assert run_script(script, files, "--label", "kind") == 2
    assert "table.csv is no CSV in UTF-8" in capsys.readouterr().err
    np.savez(files / "features.npz", features=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        load_probe_data(files / "features.npz", files / "table.csv", label_column="kind")


def test_a_small_share_of_findings_holds_each_finding_and_a_sample_without_it():
    labels = np.zeros((200, 2), dtype=bool)
    labels[::2, 0] = True
    for seed in range(5):
        rows = stratified_subset(labels, 0.005, seed)
        assert {True, False} == set(labels[rows, 0].tolist())
