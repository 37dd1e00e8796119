"""scripts/prepare_hospital.py as a hospital runs it: identifiers planted everywhere come out nowhere."""

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid  # noqa: E402

# Every one of these is planted somewhere, and none may come out anywhere.
NAMES = ["Zebulonsky", "Quirindale", "Kowalewicz", "Throckmorton", "Wimbledorf"]
SECRETS = [*NAMES, "PX-774411", "774411", "19530417", "17.04.1953", "+49 30 5550199", "5550199", "ACC889977"]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_hospital.py"
LINE = "Sankt Wimbledorf Hospital"


def film(seed: int, side: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = sum(np.sin(2 * np.pi * (rng.uniform(1, 5) * x + rng.uniform(1, 5) * y + rng.random())) for _ in range(6))
    return ((waves - waves.min()) / np.ptp(waves) * 4000).astype(np.uint16)


def write_dicom(path: Path, seed: int, patient: str, name: str) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=name.encode()[:32].ljust(128, b"\0"))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"{name}^Throckmorton", patient, "19530417"
    ds.StudyDate, ds.AccessionNumber, ds.InstitutionName = "20200101", "ACC889977", LINE
    ds.ReferringPhysicianName, ds.StudyDescription = "Kowalewicz^Anna", f"THORAX {name}"
    ds.PatientComments, ds.ImageComments = f"{name} tel +49 30 5550199", "see 17.04.1953"
    ds.ManufacturerModelName, ds.Modality, ds.PatientSex = f"DX {name}" if seed == 0 else "DX 500", "DX", "F"
    ds.BodyPartExamined, ds.ViewPosition = ("CHEST", "PA") if seed else (name.upper()[:16], name.upper()[:16])
    block = ds.private_block(0x0011, f"{name} CREATOR", create=True)
    block.add_new(0x01, "LO", f"{name} PX-774411")
    request = Dataset()
    request.RequestingPhysician, request.RequestedProcedureID = "Kowalewicz^Anna", "774411"
    ds.RequestAttributesSequence = [request]
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60000022, "LO", name)
    ds.add_new(0x60003000, "OW", b"\xff" * 8)
    ds.Rows = ds.Columns = 96
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME1", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.WindowCenter, ds.WindowWidth = 2048, 4096
    ds.PixelData = film(seed).tobytes()
    ds.save_as(path, enforce_file_format=True)


def write_picture(path: Path, seed: int, name: str) -> None:
    image = Image.fromarray((film(seed) // 16).astype(np.uint8))
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Patient", f"{name} PX-774411")
        info.add_itxt("Comment", f"{name} 17.04.1953")
        image.save(path, pnginfo=info)
    elif path.suffix == ".jpg":
        exif = Image.Exif()
        exif[0x010E], exif[0x013B] = f"{name} 19530417", name
        image.save(path, exif=exif, comment=name.encode())
    else:
        image.save(path, tiffinfo={270: f"{name} PX-774411", 315: name})


def make_hospital(folder: Path, num_patients: int = 12, damaged: bool = True) -> Path:
    rows = []
    for i in range(num_patients):
        name, patient = NAMES[i % 2], f"PX-7744{11 + i}"
        for j, ending in enumerate((".dcm", (".png", ".jpg", ".tif")[i % 3])):
            path = folder / f"{name}_{patient}" / f"{name}{i}_{j}_19530417{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            seed = 2 * i + j
            write_dicom(path, seed, patient, name) if ending == ".dcm" else write_picture(path, seed, name)
            text = (
                f"Ms {name} (born 17.04.1953, MRN {patient}, tel +49 30 5550199) of {LINE}. No effusion in film {i}. "
                f"{name.upper()} was seen by Dr. Kowalewicz; Throckmorton asked."
            )
            rows.append(
                [str(path.relative_to(folder)), patient, f"{name}, Throckmorton", text, i % 2, "" if j else 1 - i % 2]
            )
    if damaged:
        broken = folder / f"{NAMES[0]}.dcm"
        broken.write_bytes(b"\0" * 128 + b"DICM" + b"Zebulonsky PX-774411" * 20)
        (folder / "Zebulonsky.png").write_bytes(b"Zebulonsky")
        rows += [[p, "PX-774499", "Zebulonsky", "Zebulonsky", 1, 1] for p in
                 (broken.name, "Zebulonsky.png", "missing/Zebulonsky.png", "../Zebulonsky.png")]  # fmt: skip
    table = folder / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "pid", "name", "report", "label:odd", "label:even"], *rows])
    return table


def run_here(capfd, table: Path, output: Path, key: Path, *more: str) -> SimpleNamespace:
    """As `run`, in this process: importing the package again takes seconds."""
    specification = importlib.util.spec_from_file_location("prepare_hospital", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    capfd.readouterr()
    code = script.main(arguments_of(table, output, key, *more))
    printed = capfd.readouterr()
    return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)


def arguments_of(table: Path, output: Path, key: Path, *more: str) -> list[str]:
    return [
        *("--table", str(table), "--output", str(output), "--key", str(key), "--path-column", "file"),
        *("--patient-column", "pid", "--text-column", "report", "--identifying-columns", "name", *more),
    ]


def run(table: Path, output: Path, key: Path, *more: str, home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments_of(table, output, key, *more)]
    environment = os.environ | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "XDG_CACHE_HOME": str(home),
        "HF_HOME": str(home),
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def everything_in(folder: Path) -> str:
    """Names and contents of all files below a folder, columns and pictures of Parquet files decoded."""
    found = []
    for path in sorted(folder.rglob("*")):
        found.append(str(path.relative_to(folder)))
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            found.append(str(file.schema_arrow.metadata))
            for record in file.read().to_pylist():
                content = (record.get("image") or {}).pop("bytes", b"") or b""
                found += [repr(record), content.decode("latin-1")]
                if content:
                    found.append(repr(Image.open(io.BytesIO(content)).info))
        elif path.is_file():
            found.append(path.read_bytes().decode("latin-1"))
    return "\n".join(found)


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret.casefold() in text.casefold()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital")
    home = tmp_path_factory.mktemp("home")
    output, key = tmp_path_factory.mktemp("out") / "set", home / "secret.key"
    done = run(make_hospital(folder), output, key, "--burned-in", "keep", "--mixed", "report", home=home)
    assert done.returncode == 0, done.stderr
    return output, key, done, home, folder


def test_no_planted_identifier_comes_out_anywhere(prepared):
    output, _, done, home, _ = prepared
    assert leaks(done.stdout + done.stderr) == []
    assert leaks(everything_in(output)) == []
    assert leaks(everything_in(home)) == []  # caches, temporary files, the search set beside the key


def test_every_row_is_prepared_or_counted_with_its_row_number(prepared):
    output, *_ = prepared
    facts = json.loads((output / "dataset.json").read_text())
    assert sum(count["rows"] for count in facts["counts"].values()) == 24
    drops = [json.loads(line) for line in (output / "dropped" / "rows.jsonl").read_text().splitlines()]
    assert [drop["row"] for drop in drops] == [26, 27, 28, 29]
    assert drops[2]["reason"] == "file missing"
    assert drops[3]["reason"] == "path outside the folder of the data"
    assert facts["report"]["replaced_in_texts"]["NAME"] >= 24


def test_splits_are_disjoint_in_patients_and_the_words_of_medicine_stay(prepared):
    output, *_ = prepared
    patients = {}
    for split in ("train", "validation", "test"):
        records = [r for path in output.glob(f"{split}-*.parquet") for r in pq.read_table(path).to_pylist()]
        patients[split] = {r["patient_id"] for r in records}
        assert all("No effusion in film" in r["caption"] for r in records)
        assert {r["sex"] for r in records} == {"F", ""}
    assert all(patients.values())
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 12


OPTIONS = ("--burned-in", "keep", "--mixed", "report")


def test_a_class_that_is_named_after_a_patient_is_refused_without_naming_it(prepared, tmp_path, capfd):
    _, key, _, _, folder = prepared
    table = folder / "classes.csv"
    table.write_text((folder / "table.csv").read_text().replace("label:odd", "label:Quirindale sign", 1))
    done = run_here(capfd, table, tmp_path / "o", key, *OPTIONS)
    assert done.returncode == 2
    assert "classes [1] of 2" in done.stderr
    assert leaks(done.stderr) == []
    allowed = run_here(capfd, table, tmp_path / "o", key, *OPTIONS, "--allow-words", "Quirindale")
    assert allowed.returncode == 0


def test_a_name_in_the_element_of_the_modality_is_not_shown(prepared, tmp_path, capfd):
    _, key, _, _, folder = prepared
    path = folder / "odd.dcm"
    write_dicom(path, 78, "PX-774411", "Zebulonsky")
    dataset = pydicom.dcmread(path)
    dataset.Modality = "ZEBULONSKY"
    dataset.save_as(path)
    table = folder / "odd.csv"
    table.write_text((folder / "table.csv").read_text() + "odd.dcm,PX-774411,,clear,1,0\n")
    done = run_here(capfd, table, tmp_path / "o", key, "--burned-in", "keep")
    assert "12 × DX, 1 × other" in done.stderr


def test_a_second_run_gives_the_same_and_other_settings_are_refused(prepared, capfd):
    output, key, _, _, folder = prepared
    before = (output / "dataset.json").read_bytes()
    assert run_here(capfd, folder / "table.csv", output, key, *OPTIONS).returncode == 0
    assert (output / "dataset.json").read_bytes() == before
    other = run_here(capfd, folder / "table.csv", output, key, *OPTIONS, "--max-side", "32")
    assert other.returncode == 2
    assert "Name another folder" in other.stderr
    assert leaks(other.stderr) == []


def test_a_run_that_was_broken_off_goes_on_and_gives_the_same_rows(prepared, tmp_path, capfd, monkeypatch):
    output, key, _, _, folder = prepared
    from medclip_hf.data.hospital import prepare

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(prepare, "_duplicates", stop)
        assert run_here(capfd, folder / "table.csv", tmp_path / "b", key, *OPTIONS).returncode == 130
    assert leaks(everything_in(tmp_path / "b")) == []  # what lies there meanwhile identifies nobody either
    with monkeypatch.context() as resumed:
        resumed.setattr("medclip_hf.data.hospital.figures.read_pictures", stop)  # nothing is read again
        assert run_here(capfd, folder / "table.csv", tmp_path / "b", key, *OPTIONS).returncode == 0
    for split in ("train", "validation", "test"):
        one, two = (pq.read_table(folder / f"{split}-00000.parquet") for folder in (output, tmp_path / "b"))
        assert one.equals(two)


def test_a_damaged_table_or_key_gives_one_sentence_without_its_cells(prepared, tmp_path, capfd):
    _, _, _, home, folder = prepared
    text = (folder / "table.csv").read_text()
    for content, words in (
        (text.replace(",", ";").encode(), "semicolon"),
        (text.replace("Zebulonsky", "Zebulonsk\xfd").encode("cp1252"), "UTF-8"),
        (text.partition("\n")[2].encode(), "lacks the columns"),
        (b"", "empty"),
    ):
        table = tmp_path / "bad.csv"
        table.write_bytes(content)
        done = run_here(capfd, table, tmp_path / "o", home / "k.key")
        assert done.returncode == 2
        assert words in done.stderr
        assert leaks(done.stderr) == []
    inside = run_here(capfd, folder / "table.csv", tmp_path / "o", tmp_path / "o" / "k")
    assert inside.returncode == 2
    assert "lies inside" in inside.stderr


def test_mixed_modalities_are_refused_with_their_counts(prepared, tmp_path, capfd):
    _, key, _, _, folder = prepared
    path = folder / "ultrasound.dcm"
    write_dicom(path, 77, "PX-774411", "Zebulonsky")
    dataset = pydicom.dcmread(path)
    dataset.Modality = "US"
    dataset.save_as(path)
    table = folder / "mixed.csv"
    table.write_text((folder / "table.csv").read_text() + "ultrasound.dcm,PX-774411,,clear,1,0\n")
    done = run_here(capfd, table, tmp_path / "o", key, "--burned-in", "keep")
    assert done.returncode == 2
    assert "12 × DX, 1 × US" in done.stderr


@pytest.mark.skipif(not Path("/usr/bin/tesseract").exists(), reason="tesseract is not installed")
def test_burned_in_text_sets_a_picture_aside_or_is_masked(tmp_path, capfd):
    image = Image.fromarray((film(1, 400) // 40 + 60).astype(np.uint8))
    ImageDraw.Draw(image).text((20, 20), "ZEBULONSKY MARTHA", fill=255, font_size=28)
    folder = tmp_path / "films"
    folder.mkdir()
    image.save(folder / "a.png")
    Image.fromarray((film(2, 400) // 16).astype(np.uint8)).save(folder / "b.png")
    table = folder / "t.csv"
    table.write_text("file,pid,name,report\n" + "".join(f"{n}.png,{n},,clear\n" for n in "ab"))
    done = run_here(capfd, table, tmp_path / "o", tmp_path / "k", "--shares", "1", "0", "0")
    assert done.returncode == 0, done.stderr
    assert "1 set aside: text burned into the picture" in done.stdout
    table.write_text("file,pid,name,report\na.png,a,,clear\n")  # Tesseract takes seconds a picture
    done = run_here(capfd, table, tmp_path / "m", tmp_path / "k", "--shares", "1", "0", "0", "--burned-in", "mask")
    assert json.loads((tmp_path / "m" / "dataset.json").read_text())["report"]["pictures_masked"] == 1
    assert leaks(done.stdout + done.stderr) == []
