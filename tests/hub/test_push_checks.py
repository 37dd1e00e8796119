"""The check before a push finds what is planted, names file and place, and never says what it found."""

import base64
import importlib.util
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from medclip_hf.data.hospital.pseudonyms import KEY_BYTES, Pseudonyms, read_or_create_key
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.hub.push import files_to_push
from medclip_hf.hub.push_checks import check_before_push

VALUES = ["ZEBULONSKY^MARTHA", "Müller, Jörg", "PX-774411", "00123456", "19530417", "12", "1.2.840.99.1.2.3.4.5.6"]


@pytest.fixture
def identifiers() -> SearchSet:
    search_set = SearchSet(Pseudonyms(b"k" * KEY_BYTES))
    search_set.add(VALUES)
    return search_set


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"hidden_size": 1024, "layer_norm_eps": 0.123456, "model_type": "x"})
    )
    (folder / "README.md").write_text(
        "# Model\nTrained on 12 films of 774 patients, see https://example.org/home/data.\n"
    )
    (folder / "vocab.txt").write_text("[PAD]\nzebulonsky\nmartha\n##ing\n/\n")
    save_file({"a.weight": np.zeros(3, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_clean_folder_passes(model, identifiers):
    assert check_before_push(model, identifiers) == []
    assert check_before_push(model, None) == []


@pytest.mark.parametrize(
    "text",
    [
        "seen in px774411 today",
        "PX 774 411",
        "Px_774-411",
        "id 123456",
        "Martha Zebulonsky",
        "zebulonsky, MARTHA",
        "The Zebulonsky case",
        "Joerg Mueller",
        "Jörg Müller",
        "born 17.04.1953",
        "born 1953-04-17",
        "04/17/1953",
        "April 17, 1953",
        "17th April 1953",
        '{"uid": "1.2.840.99.1.2.3.4.5.6"}',
        '{"name": "M\\u00fcller"}',
        "saved to /home/zoe/run",
        r"C:\Users\zoe\run",
        r'{"dir": "D:\\data\\films"}',
        "token hf_" + "a" * 34,
    ],
)
def test_what_is_planted_in_a_card_is_found_and_not_repeated(model, identifiers, text):
    with (model / "README.md").open("a", encoding="utf-8") as file:
        file.write("\n" + text + "\n")
    findings = check_before_push(model, identifiers)
    assert findings
    assert {finding.file for finding in findings} == {"README.md"}
    assert findings[0].place == "line 4"
    shown = " ".join(map(str, findings)).casefold()
    assert not any(word in shown for word in ("zebul", "774", "1953", "ller", "123456", "zoe"))


def test_it_is_found_in_metadata_of_weights_columns_and_text_chunks(model, identifiers):
    save_file({"a": np.zeros(3, np.float32)}, model / "x.safetensors", metadata={"note": "for PX-774411"})
    save_file({"head.Martha Zebulonsky": np.zeros(3, np.float32)}, model / "y.safetensors")
    info = PngImagePlugin.PngInfo()
    info.add_text("c", "PX-774411")
    sink = io.BytesIO()
    Image.new("L", (4, 4)).save(sink, "PNG", pnginfo=info)
    data = model.parent / "data"
    data.mkdir()
    rows = [{"row_id": "a", "image": {"bytes": sink.getvalue()}, "caption": "clear"}, {"caption": "Zebulonsky"}]
    pq.write_table(pa.Table.from_pylist(rows), data / "train-00000.parquet")
    assert {f"{f.file} {f.place}" for f in check_before_push(model, identifiers)} == {
        "x.safetensors metadata entry",
        "y.safetensors names of tensors",
    }
    found = [f.place for f in check_before_push(data, identifiers, "dataset")]
    assert "column caption, row 1" in found
    assert "column image, row 0: text chunk" in found


def test_leftovers_of_runs_and_files_of_patients_are_found_by_kind(model, identifiers):
    for name in (
        "optimizer.safetensors",
        "events.out.tfevents.1",
        "train.log",
        "patients.csv",
        "a.nii.gz",
        "x.pt",
        "s.key",
    ):
        (model / name).write_bytes(b"\0\0\0\0\0\0\0\0")
    Image.new("L", (4, 4)).save(model / "film.png")
    (model / "scan").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 8)
    (model / "renamed.json").write_bytes(b"\x80\x04pickled")
    (model / "link.txt").symlink_to("/etc/hostname")
    kinds = {finding.file: finding.kind for finding in reversed(check_before_push(model, identifiers))}
    assert kinds["optimizer.safetensors"] == "state of a training run"
    assert kinds["events.out.tfevents.1"] == kinds["train.log"] == "log"
    assert kinds["patients.csv"] == "table"
    assert kinds["a.nii.gz"] == kinds["scan"] == "volume or DICOM file"
    assert kinds["film.png"].startswith("picture")
    assert kinds["x.pt"].startswith("pickled")
    assert kinds["renamed.json"].startswith("pickled")
    assert kinds["s.key"] == "key or secret"
    assert kinds["link.txt"] == "link out of the folder"


def test_a_file_named_after_a_patient_is_found_without_naming_it(model, identifiers):
    (model / "Zebulonsky.json").write_text("{}")
    findings = check_before_push(model, identifiers)
    assert len(findings) == 1
    assert "ebulon" not in str(findings[0])


def test_an_identifier_across_two_blocks_is_found_once(model, identifiers, monkeypatch):
    monkeypatch.setattr("medclip_hf.hub.push_checks.TEXT_BLOCK", 1000)
    (model / "notes.txt").write_text("x" * 10 + " word" * 196 + " PX-774411" + " word\n" * 400)
    findings = check_before_push(model, identifiers)
    assert [(f.file, f.place) for f in findings] == [("notes.txt", "line 1")]


def test_parts_of_names_can_be_allowed_but_not_whole_names(model, identifiers):
    (model / "notes.txt").write_text("The Zebulonsky sign.\n")
    assert check_before_push(model, identifiers, allowed_words=["Zebulonsky"]) == []
    (model / "notes.txt").write_text("Martha Zebulonsky\n")
    assert check_before_push(model, identifiers, allowed_words=["Zebulonsky", "Martha"])


def test_bytes_behind_the_tensors_are_found(model, identifiers):
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"Zebulonsky")
    assert [f.kind for f in check_before_push(model, identifiers)] == ["bytes that belong to no tensor"]


DEEP = b"[" * 100_000  # deeper than a reader of JSON follows


@pytest.mark.parametrize("header", [b"5", b"[]", DEEP, b'{"__metadata__": "x"}', b'{"a": [1, 2]}'])
def test_a_header_that_is_none_is_a_finding(model, header):
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (finding,) = check_before_push(model, None)
    assert "cannot be searched" in finding.kind


@pytest.mark.parametrize("content", [b"[]", b'{"model": [1]}', DEEP])
def test_a_tokenizer_that_is_none_is_a_finding(model, content):
    (model / "tokenizer.json").write_bytes(content)
    assert any("cannot be searched" in finding.kind for finding in check_before_push(model, None))


@pytest.mark.parametrize("content", [b"[]", b'{"base_model_name_or_path": ["a"]}', DEEP])
def test_an_adapter_that_is_none_is_refused(model, content):
    (model / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="no configuration of an adapter"):
        files_to_push(model)


@pytest.mark.parametrize("name", ["a\nb.md", "a\x1b[2Jb.md", "a\u202eb.md", "a\udcffb.md"])
def test_a_name_that_steers_a_screen_is_refused_and_not_shown(model, name):
    (model / name).write_text("harmless")
    (finding,) = check_before_push(model, None)
    assert "its name cannot be printed" in finding.file
    assert str(finding).isprintable()


def test_links_in_a_circle_are_refused(model):
    (model / "a.json").symlink_to(model / "b.json")
    (model / "b.json").symlink_to(model / "a.json")
    assert {finding.kind for finding in check_before_push(model, None)} == {"link out of the folder"}
    with pytest.raises(ValueError, match="is a link"):
        files_to_push(model)


def test_a_search_set_reads_back_and_needs_its_key(tmp_path, identifiers):
    identifiers.save(tmp_path / "set.json")
    text = (tmp_path / "set.json").read_text()
    assert (tmp_path / "set.json").stat().st_mode & 0o077 == 0
    assert "zebul" not in text.casefold()
    again = SearchSet.load(tmp_path / "set.json", Pseudonyms(b"k" * KEY_BYTES))
    assert [hit.kind for hit in again.search("PX-774411")] == ["identifier"]
    assert identifiers.num_too_short == 1  # "12"
    with pytest.raises(ValueError, match="another key"):
        SearchSet.load(tmp_path / "set.json", Pseudonyms(b"x" * KEY_BYTES))


def push(repository, capfd, *arguments):
    path = repository / "scripts" / "push_to_hub.py"
    specification = importlib.util.spec_from_file_location("push_to_hub", path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    code = script.main(list(map(str, arguments)))
    return code, capfd.readouterr()


def test_the_script_stops_at_a_finding_and_lists_a_clean_folder(repository, model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("nothing may leave"))
    key = tmp_path / "k"
    search_set = SearchSet(read_or_create_key(key))
    search_set.add(VALUES)
    search_set.save(tmp_path / "k.identifiers.json")
    code, printed = push(repository, capfd, model, "a/b", "--key", key, "--dry-run")
    assert code == 0, printed.err
    assert "clean: 4 files" in printed.out
    (model / "config.json").write_text('{"_name_or_path": "/home/zoe/PX-774411"}')
    code, printed = push(repository, capfd, model, "a/b", "--key", key)
    assert code == 1
    assert "config.json (line 1)" in printed.err
    assert "774411" not in printed.err
    assert push(repository, capfd, model, "a/b")[0] == 2


def test_the_script_takes_identifiers_from_a_table(repository, model, tmp_path, capfd):
    table = tmp_path / "t.csv"
    table.write_text("pid,name\nPX-774411,Zebulonsky\n")
    (model / "README.md").write_text("PX774411\n")
    options = ("--table", table, "--identifying-columns", "pid,name", "--dry-run")
    assert push(repository, capfd, model, "a/b", *options)[0] == 1
    code, printed = push(repository, capfd, model, "a/b", *options, "--separator", ";")
    assert code == 2
    assert "separator" in printed.err


def test_names_of_columns_and_fields_are_searched_and_not_repeated(tmp_path, identifiers):
    rows = [{"Martha Zebulonsky": "PX-774411", "facts": {"Zebulonsky": 1}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000.parquet")
    findings = check_before_push(tmp_path, identifiers, "dataset")
    assert {finding.place for finding in findings} >= {"names of columns", "column 1 (its name is withheld), row 0"}
    assert "zebulonsky" not in "".join(map(str, findings)).lower()


@pytest.mark.parametrize(
    ("identifier", "text"),
    [
        ("O'Brien^Sean", "o’brien"),
        ("O'Brien^Sean", "OBrien"),
        ("Zebulonsky^Martha", "ZebulonskyMartha.png"),
        ("Zebulonsky^Martha", "Zebulonskys film"),
        ("Zebulonsky^Martha", "Zebu-\nlonsky"),
        ("Zebulonsky^Martha", "Zebulоnsky"),
        ("山田^太郎", "山田さんの胸部"),
        ("MRN-12-34-567", "1234567"),
        ("Zebulonsky, *03.04.1956", "Zebulonsky"),
        ("19560403", "3rd of April 1956"),
        ("19560403", "4/3/56"),
        ("19560403", "03041956"),
        ("19560403", "03APR1956"),
        ("19560403", "3 de abril de 1956"),
        ("19560403", "1956年4月3日"),
        ("+49 171 5551770", "0171-5551770"),
        ("MacGillivray^Fiona", "Mac Gillivray"),
        ("McGillivray^Fiona", "macgillivray"),
    ],
)
def test_an_identifier_is_found_in_other_spellings(identifier, text):
    search_set = SearchSet(Pseudonyms(b"k" * KEY_BYTES))
    search_set.add([identifier])
    assert list(search_set.search(text))


def test_versions_and_unique_identifiers_are_no_dates_of_birth():
    search_set = SearchSet(Pseudonyms(b"k" * KEY_BYTES))
    search_set.add(["1.3.12.2.1107.5.1.4", "19120301"])
    assert not list(search_set.search("version 1.3.120, release 2.1.3.12, loss 0.3.12"))


def hidden_texts() -> dict[str, bytes]:
    """File name -> content, in each of which an identifier is hidden in another way."""
    secret = "Patient Zebulonsky Martha PX-774411"
    header = b'{"a":{"dtype":"U8","shape":[36],"data_offsets":[0,36]}}'
    hole = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[35,36]}}'
    return {
        "entities.md": b"M&#252;ller",
        "percent.md": b"[x](https://a.b/?q=M%C3%BCller)",
        "escape.yaml": rb'x: "M\xfcller"',
        "line.json": rb'{"x": "seen\nZebulonsky"}',
        "base64.md": base64.b64encode(secret.encode()),
        "hexadecimal.txt": secret.encode().hex().encode(),
        "picture.md": b"![](data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n" + bytes(60)) + b")",
        "number.json": b'{"patients": ["44017"]}',
        "path.json": b'{"x": "/films7/zoe"}',
        "utf16.txt": secret.encode("utf-16-le"),
        "cp1250.txt": "M\u00fcller".encode("cp1250"),
        "table.json": b"\x89HDF\r\n",
        "archive.json": lzma.compress(secret.encode()),
        "text.txt": b"{\\rtf1 Zebulo\\'6esky}",
        "tokenizer.json": b'{"added_tokens": [{"content": "Zebulonsky"}], "model": {"vocab": {"martha": 1}}}',
        "bytes.safetensors": len(header).to_bytes(8, "little") + header + secret.ljust(36).encode(),
        "hole.safetensors": len(hole).to_bytes(8, "little") + hole + bytes(36),
        "numbers.onnx_data": bytes(40) + secret.encode() + bytes(40),
    }


@pytest.mark.parametrize("name", hidden_texts())
def test_what_is_hidden_in_a_file_is_found(model, identifiers, name):
    identifiers.add(["44017"])
    (model / name).write_bytes(hidden_texts()[name])
    findings = check_before_push(model, identifiers)
    assert {finding.file for finding in findings} == {name}
    assert not any(word in str(findings).casefold() for word in ("zebul", "7744", "martha", "44017"))


def test_a_name_in_the_name_of_a_tensor_is_found_and_words_of_networks_are_none(model, identifiers):
    identifiers.add(["Norm", "Lora"])
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").unlink()
    save_file({"base.lora_A.norm.weight": np.zeros(1, np.float32)}, model / "a.safetensors")
    assert check_before_push(model, identifiers) == []
    save_file({"head.Zebulonsky.weight": np.zeros(1, np.float32)}, model / "a.safetensors")
    assert [finding.place for finding in check_before_push(model, identifiers)] == ["names of tensors"]


def test_random_weights_and_digests_hold_no_identifier(model):
    rng = np.random.default_rng(0)
    search_set = SearchSet(Pseudonyms(b"k" * KEY_BYTES))
    search_set.add([f"{number:06d}" for number in rng.integers(0, 10**6, 3000)])
    save_file({"w": rng.normal(size=2_000_000).astype(np.float32)}, model / "model.safetensors")
    (model / "digests.json").write_text(json.dumps([rng.bytes(32).hex() for _ in range(200)]))
    assert check_before_push(model, search_set) == []
