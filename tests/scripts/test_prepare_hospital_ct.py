"""scripts/prepare_hospital.py on a real CT series with planted identifiers, end to end to the trainer's data set."""

import csv
import importlib.util
import json
import shutil

import pyarrow.parquet as pq
import pytest

from medclip_hf.data.hospital.rows import read_labels, read_subgroups
from medclip_hf.training.scan_datasets import ScanDataset

pydicom = pytest.importorskip("pydicom")
SECRETS = ("zebulonsky", "774411", "wimbledorf", "kowalewicz")


def test_a_ct_series_comes_out_without_its_patient_and_trains(repository, real_data, tmp_path, capfd):
    source, root, output = real_data / "ct", tmp_path / "archive", tmp_path / "out"
    series = root / "ZEBULONSKY_MARTHA"
    series.mkdir(parents=True)
    for path in (source / "example_ct_dicom").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PatientName, dataset.PatientID, dataset.PatientSex = "Zebulonsky^Martha", "PX-774411", "F"
        dataset.InstitutionName, dataset.PatientComments = "Wimbledorf", "Zebulonsky"
        dataset.save_as(series / f"ZEBULONSKY_{path.name}")
    shutil.copy(source / "example_seg_dicom.nii.gz", root / "Kowalewicz.nii.gz")
    (root / "broken_Zebulonsky.nii.gz").write_bytes(b"Zebulonsky")
    rows = [
        [series.name, "PX-774411", "Kowalewicz.nii.gz", "Ms Zebulonsky has no effusion.", "Dr. Kowalewicz", ""],
        ["broken_Zebulonsky.nii.gz", "PX-774412", "Kowalewicz.nii.gz", "", "", ""],
    ]
    with (root / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "patient_id", "seg", "findings", "impression", "sex"], *rows])
    arguments = ["--table", root / "t.csv", "--output", output, "--key", tmp_path / "k", "--kind", "scans"]
    arguments += ["--segmentation-column", "seg", "--text-column", "findings", "--impression-column", "impression"]
    arguments += ["--shares", "1", "0", "0", "--without-presidio"]
    script = repository / "scripts" / "prepare_hospital.py"
    specification = importlib.util.spec_from_file_location("prepare_hospital_ct", script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    capfd.readouterr()
    assert module.main(list(map(str, arguments))) == 0
    printed = "".join(capfd.readouterr())
    everything = printed + "".join(
        f"{path.relative_to(output)}\n{path.read_bytes().decode('latin-1') if path.is_file() else ''}"
        for path in sorted(output.rglob("*"))
    )
    everything += "".join(str(pq.read_table(path).to_pylist()) for path in output.glob("*.parquet"))
    assert not [secret for secret in SECRETS if secret in everything.lower()]
    drops = [json.loads(line) for line in (output / "dropped" / "rows.jsonl").read_text().splitlines()]
    assert [drop["row"] for drop in drops] == [3]
    ((scan_id, (patient, _)),) = read_labels(output, "train").items()
    assert len(patient) == 32
    assert read_subgroups(output, "train")[scan_id].sex == "F"
    example = ScanDataset(output, "train", anatomies=("aorta",), size_dhw=(16, 32, 32))[0]
    assert example.image.shape == (16, 32, 32)
