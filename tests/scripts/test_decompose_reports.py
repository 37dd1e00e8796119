import csv
import json
import subprocess
import sys

import pytest

from medclip_hf.data.phantoms.torso_reports import write_report
from medclip_hf.data.phantoms.torsos import plan_patient


def run(repository, *arguments):
    command = [sys.executable, str(repository / "scripts/decompose_reports.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_decomposes_a_table_and_tells_how_well(repository, tmp_path):
    table = tmp_path / "reports.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["VolumeName", "Findings_EN", "Impressions_EN"])
        for patient in range(8):
            report = write_report(plan_patient(1, patient)[0])
            writer.writerow([f"train_{patient}_a_1.nii.gz", report.findings, report.impression])
        writer.writerow(["train_9_a_1.nii.gz", "Not given.", ""])
    result = run(repository, "--reports", table, "--output", tmp_path / "out", "--anatomies", "lung,heart")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/anatomy_texts.jsonl").read_text().splitlines()]
    quality = json.loads((tmp_path / "out/quality.json").read_text())
    assert [line["study_id"] for line in lines] == [f"train_{patient}_a" for patient in range(8)]
    assert [text["anatomy"] for text in lines[0]["anatomy_texts"]] == ["lung", "heart"]
    assert quality["num_reports"] == 8
    assert quality["num_set_aside"] == {"report empty": 1}
    assert "8 reports decomposed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reports", "nowhere.csv"), "nowhere.csv"),
        (("--reports", "nowhere.csv", "--anatomies", "third eye"), "third eye"),
    ],
)
def test_a_run_that_cannot_work_ends_with_one_line(repository, tmp_path, arguments, message):
    result = run(repository, *arguments, "--output", tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
