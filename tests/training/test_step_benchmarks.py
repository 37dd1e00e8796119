"""The benchmarks of training steps run at a tiny size, so that one with a GPU at hand finds them working."""

import argparse
import importlib.util
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


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
    prepared = script.prepare(request)
    assert (prepared.rows, torch.isfinite(prepared.step()).item()) == (4, True)
    assert prepared.losses().item() == pytest.approx(prepared.losses().item())
    assert prepared.flops > 0


@pytest.mark.parametrize("variant", ["published", "ours, bf16"])
def test_a_step_of_fvlm_runs(benchmark, variant):
    script = benchmark("gpu_fvlm")
    prepared = script.prepare({"tiny": True, "rows": 2, "micro_batches": 1} | script.VARIANTS[variant])
    assert (prepared.rows, torch.isfinite(prepared.step()).item()) == (2, True)
    assert torch.isfinite(prepared.losses())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_device(benchmark, monkeypatch, name, tflops):
    steps = benchmark("gpu_steps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert steps._peak_tflops() == tflops


def test_a_variant_that_does_not_fit_is_told_in_the_words_of_the_device(benchmark, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('[W] something to say at the end', file=sys.stderr))\n"
        "class OutOfMemoryError(RuntimeError): pass\n"
        "raise OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')\n"
    )
    told = benchmark("step_models").in_own_process(str(script), {})["error"]
    assert "CUDA out of memory" in told


def test_the_step_computes_in_the_precision_of_the_loop(benchmark):
    models = benchmark("step_models")
    model = models.conceptclip_model("tiny", dropout=0.0)
    seen = []

    class Objective(models.ConceptCLIPObjective):
        def compare(self, embeddings, batch):
            seen.append((embeddings["patch_embeds"].dtype, torch.is_autocast_enabled("cpu")))
            return super().compare(embeddings, batch)

    batch = models.whole_pixels(models.conceptclip_batch(model.config, 2), 255, torch.uint8)
    models.make_step(model, Objective(), batch, device=torch.device("cpu"), bf16=True)()
    assert seen == [(torch.float32, False)]


def test_a_step_of_open_clip_without_open_clip_is_a_sentence_in_the_table(benchmark, monkeypatch):
    script = benchmark("gpu_conceptclip")
    monkeypatch.setattr(script, "why_not", lambda: "not measured: open_clip not installed")
    request = {"tiny": True, "stage": 1, "rows": 2, "concepts": 2, "micro_batches": 1, "repeats": 1}
    monkeypatch.setattr(sys, "argv", ["gpu_conceptclip.py"])
    steps = sys.modules["gpu_steps"]
    for stage, said in ((1, "not installed"), (2, "no second stage")):
        found = steps._one(request | {"stage": stage} | script.VARIANTS["open_clip, all recomputed"], script.prepare)
        assert said in found["error"]


def test_the_published_size_without_a_gpu_is_refused(benchmark, monkeypatch, capsys):
    script = benchmark("gpu_fvlm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_fvlm.py"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "no GPU was found" in capsys.readouterr().err


def test_a_batch_without_rows_is_refused(benchmark, monkeypatch, capsys):
    script = benchmark("gpu_fvlm")
    monkeypatch.setattr(sys, "argv", ["gpu_fvlm.py", "--tiny", "--batches", "0"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err


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


@pytest.mark.parametrize("stage", [1, 2])
def test_operations_at_the_published_size_are_those_that_pytorch_counts(benchmark, stage):
    models = benchmark("step_models")
    with torch.device("meta"):
        model = models.conceptclip_model("published", stage=stage).eval()
    vision = model.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1152, 27, 384, 14)
    batch = models.conceptclip_batch(model.config, 2, tokens=(40, 40))
    input_ids = batch["input_ids"].to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        patches = model.vision_model(pixel_values=batch["pixel_values"].to("meta")).last_hidden_state
        model.text_model(input_ids=input_ids, token_type_ids=torch.zeros_like(input_ids))
        if stage == 2:
            model.patch_projection(patches)
    assert models.conceptclip_flops(model.config, batch) == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)


def test_operations_of_fvlm_at_the_published_size_are_those_that_pytorch_counts(benchmark):
    models = benchmark("step_models")
    with torch.device("meta"):
        model = models.fvlm_model("published").eval()
    assert tuple(model.config.vision_config.image_size_dhw) == (112, 256, 352)
    batch = models.fvlm_batch(model.config, 1, tokens=(40, 40))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(batch["pixel_values"].to("meta"))
        model.text_model(input_ids=batch["input_ids"].to("meta"))
    assert models.fvlm_flops(model.config, batch) == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)


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


def test_processes_exchange_the_bytes_of_the_formula(benchmark):
    script = benchmark("cost_model")
    _, travelled = script.losses_of(2, repeats=1)
    told = sum(
        script.exchanged_bytes(2, script.SHARE.images, rows, script.SHARE.width) for rows in (1, script.SHARE.concepts)
    )
    assert travelled == pytest.approx(told, rel=0.02)  # labels come on top


def test_the_time_of_embedding_is_told_by_tower_data_and_driver(benchmark, capsys):
    script = benchmark("embedding_throughput")
    script.measure_pictures(
        argparse.Namespace(
            layers=1,
            image_size=32,
            elsewhere_ms=5.0,
            patches=False,
            workers=[0],
            own_cores=False,
            pictures=8,
            side=32,
            batch_size=4,
            rounds=1,
        )
    )
    told = capsys.readouterr().out
    assert "pipeline, 0 loader workers" in told
    tower, data, driver = (float(share) for share in re.findall(r"(?:tower|data|driver) (-?[\d.]+)%", told))
    assert tower > 0
    assert tower + data + driver == pytest.approx(100, abs=0.2)
