"""One process, four processes and an actor of Ray write the same data set, with the real concept extractor."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.engine.ray import RayRunner
from medclip_hf.data.engine.run import build_medconcept
from medclip_hf.data.engine.settings import EngineSettings, OutputSettings, SourceSettings
from medclip_hf.data.workers import ProcessRunner

CAPTIONS = (
    "Axial CT of the chest shows a mass in the right upper lobe; no pleural effusion.",
    "Possible pneumonia on the chest radiograph of a patient with fever.",
    "Histology: invasive ductal carcinoma, H&E stain.",
    "T2-weighted MRI of the brain with a haemorrhage.",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        lines.append({"image": f"{number}.jpg", "caption": CAPTIONS[number % 4], "pmcid": f"PMC{number}"})
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "table.jsonl"


def build(table, folder, runner):
    source = SourceSettings("table", str(table), items_per_unit=5)
    build_medconcept(EngineSettings(source, OutputSettings(str(folder), rows_per_shard=7)), runner)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def of_one_process(table, tmp_path_factory):
    return build(table, tmp_path_factory.mktemp("one") / "out", ProcessRunner(0))


def test_four_processes_write_what_one_writes(table, of_one_process, tmp_path):
    assert sum(name.endswith(".parquet") for name in of_one_process) > 3
    assert build(table, tmp_path / "out", ProcessRunner(4)) == of_one_process


@pytest.mark.timeout(1200)  # every step starts an actor, which imports the package: minutes on a busy machine
def test_an_actor_of_ray_writes_what_one_process_writes(table, of_one_process, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    light = {"env_vars": {"MEDCLIP_HF_REGISTER": "0"}}  # actors start in a fifth of the time
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=light)
    try:
        assert build(table, tmp_path / "out", RayRunner(1)) == of_one_process
    finally:
        ray.shutdown()
