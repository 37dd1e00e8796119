import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("zarr")

from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "demo_fvlm.py"
    spec = importlib.util.spec_from_file_location("demo_fvlm", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_fvlm"] = module
    spec.loader.exec_module(module)
    return module


def test_the_demo_runs_from_drawing_to_report(run_demo, tmp_path):
    output = tmp_path / "demo"
    code, printed = run_demo("demo_fvlm", output, launched="per_anatomy_calibrated")
    assert code == 0
    assert "Mean, prompts as published" in printed
    results = json.loads((output / "results.json").read_text())
    assert len(results["auc"]) == 3
    assert len(results["gain_of_iii"]) == 2
    pictures = sorted((output / "pictures").glob("*.png"))
    assert pictures
    assert all(np.asarray(Image.open(path)).std() > 10 for path in pictures)
    report = (output / "report.html").read_text()
    assert report.count("data:image/png;base64") == len(pictures)
    assert "not a medical device" in report


def test_a_folder_that_no_demo_made_is_left_alone(script, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert script.main(["--quick", "--output", str(tmp_path)]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_prompts_belong_to_findings_that_are_drawn(script):
    drawn = {script.DRAWN_FINDINGS[name].ct_rate_name: script.DRAWN_FINDINGS[name].anatomy for name in script.SHOWN}
    asked = {finding.name: finding.anatomy for finding in CT_RATE_FINDINGS if finding.name in script.PROMPTS}
    assert asked == drawn


def test_a_model_gains_nothing_over_itself_and_something_over_chance(script):
    rng = np.random.default_rng(0)
    labels = rng.random((60, 2)) < 0.5
    scans = script.HeldOutScans([], [], labels, np.array([f"p{number // 2}" for number in range(60)]))
    good, chance = labels + rng.normal(0, 0.5, (60, 2)), rng.random((60, 2))
    plan = script.Plan(0, 0, 0, num_resamples=100)
    nothing = script.paired_gain(good, good, scans, plan)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    something = script.paired_gain(good, chance, scans, plan)
    assert 0.1 < something.low < something.value < something.high
