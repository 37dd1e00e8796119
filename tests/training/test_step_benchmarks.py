"""The benchmarks of training steps run at a tiny size, so that one with a GPU at hand finds them working."""

import importlib.util
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark(repository):
    """Imports a file of benchmarks/ by its name."""
    folder = str(repository / "benchmarks")
    sys.path.insert(0, folder)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(folder)


@pytest.mark.parametrize("variant", ["published", "ours, half recomputed"])
def test_a_step_of_conceptclip_runs(benchmark, variant):
    script = benchmark("gpu_conceptclip")
    request = {"tiny": True, "stage": 2, "rows": 4, "concepts": 3, "micro_batches": 1} | script.VARIANTS[variant]
    step, rows, flops = script.prepare(request)
    assert (rows, torch.isfinite(step()).item()) == (4, True)
    assert flops > 0


@pytest.mark.parametrize("variant", ["published", "ours, bf16"])
def test_a_step_of_fvlm_runs(benchmark, variant):
    script = benchmark("gpu_fvlm")
    step, rows, _ = script.prepare({"tiny": True, "rows": 2, "micro_batches": 1} | script.VARIANTS[variant])
    assert (rows, torch.isfinite(step()).item()) == (2, True)


def test_the_published_size_without_a_gpu_is_refused(benchmark, monkeypatch, capsys):
    script = benchmark("gpu_fvlm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_fvlm.py"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "no GPU was found" in capsys.readouterr().err


def test_the_plain_losses_are_those_of_the_package(benchmark):
    models = benchmark("step_models")
    model = models.conceptclip_model("tiny", dropout=0.0)
    batch = models.conceptclip_batch(model.config, 5)
    embeddings = models.ConceptCLIPObjective(use_concept_identity=False).embed(model, batch)
    plain = models.PlainConceptCLIPObjective().compare(embeddings, batch)["loss"]
    ours = models.ConceptCLIPObjective(use_concept_identity=False).compare(embeddings, batch)["loss"]
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)


def test_operations_of_a_tower_are_those_of_its_matrix_products(benchmark):
    models = benchmark("step_models")
    # one token, one layer of width 1 and inner width 1: six products of weights, two of attention, two operations each
    assert models.transformer_flops(1, 1, 1, 1) == 16


def test_gradient_caching_is_measured_beside_equal_gradients(benchmark):
    found = benchmark("gradient_caching").measure(rows=8, size="tiny", micro_batches=3, compare=True)
    assert found["difference"] < 1e-5
    assert found["mebibytes"] >= 0


def test_the_losses_are_told_to_grow_with_the_gpus_and_the_towers_are_not(benchmark, capsys):
    script = benchmark("cost_model")
    script.foretell(script.Machine(), 256, 8)
    lines = {
        int(line.split()[0]): line.split()
        for line in capsys.readouterr().out.splitlines()
        if line[:6].strip().isdigit()
    }
    search = {gpus: float(line[5]) for gpus, line in lines.items()}
    assert search[512] == pytest.approx(64 * search[8], rel=0.05)
    assert lines[48][1] == "12288"  # the published global batch
