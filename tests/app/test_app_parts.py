"""Parts of the web demo without a browser: uploads, sessions, windows on another grid, models that are not there."""

import argparse
import ast
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

APP = Path(__file__).resolve().parents[2] / "app"


@pytest.fixture(scope="module")
def app() -> Iterator[SimpleNamespace]:
    """The modules of the page, which stand beside each other as on a Space."""
    sys.path.insert(0, str(APP))
    try:
        import app as command
        import ct_tab
        import demo_models
        import markup
        import picture_tab
        import sessions
        import slices

        parts = {"ct_tab": ct_tab, "demo_models": demo_models, "markup": markup, "picture_tab": picture_tab}
        yield SimpleNamespace(command=command, sessions=sessions, slices=slices, **parts)
    finally:
        sys.path.remove(str(APP))


def _request(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


def test_a_session_that_ends_removes_its_files_but_none_of_another_or_outside(app, tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    for path in (uploads / "mine", uploads / "shared", tmp_path / "outside"):
        path.write_text("x")
    held = app.sessions.Sessions(uploads, max_bytes=100)
    for path in (uploads / "mine", uploads / "shared", tmp_path / "outside"):
        held.received(_request("a"), str(path))
    held.received(_request("b"), str(uploads / "shared"))
    held.end(_request("a"))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["outside", "shared"]
    assert not held.of(_request("a")).files
    held.end(_request("b"))
    assert not (uploads / "shared").exists()


def test_a_session_without_a_word_for_an_hour_is_forgotten(app, tmp_path, monkeypatch):
    held = app.sessions.Sessions(tmp_path, max_bytes=100)
    held.of(_request("a")).values["picture"] = "pixels"
    now = app.sessions.time.monotonic()
    monkeypatch.setattr(app.sessions.time, "monotonic", lambda: now + app.sessions.MAX_IDLE_S + 1)
    held.of(_request("b"))
    assert not held.of(_request("a")).values


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"", "cannot be read as a picture: image file empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"0" * 40, "cannot be read as a picture"),
        ("a.jpg", b"PK\x03\x04" + b"0" * 40, "archives are not opened"),
        ("a.nii.gz", b"\x1f\x8b" + b"0" * 40, "is a volume"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be read as a picture: image not recognised"),
        ("a.dcm", b"0" * 128 + b"DICM" + b"0" * 40, "cannot be shown as a picture"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_without_the_servers_path(app, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        app.sessions.read_upload(tmp_path / name)
    assert str(tmp_path) not in str(refused.value)
    assert str(refused.value).startswith(name)


def test_a_large_picture_is_kept_at_the_size_that_is_needed(app, tmp_path):
    Image.effect_noise((5000, 1000), 60).save(tmp_path / "large.png")
    kept = app.sessions.read_upload(tmp_path / "large.png")
    assert (kept.size, kept.mode) == ((2048, 410), "RGB")


def test_a_picture_that_is_all_but_black_is_told_of(app, tmp_path):
    Image.fromarray(np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "twelve_bits.png")
    assert "brightest value is 16 of 255" in app.picture_tab.darkness(
        app.sessions.read_upload(tmp_path / "twelve_bits.png")
    )
    assert app.picture_tab.darkness(Image.new("RGB", (4, 4), (0, 200, 0))) == ""


def test_one_prompt_alone_is_told_to_mean_nothing(app):
    assert "always has probability 1" in app.picture_tab.prompt_answers([("Skin photograph.", 1.0)])
    assert "always" not in app.picture_tab.prompt_answers([("Skin photograph.", 0.4), ("Chest radiograph.", 0.6)])


def test_what_is_no_scan_is_refused_before_its_mask_is_asked_for(app, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="no NIfTI file"):
        app.ct_tab.read_scan(None, tmp_path / "a.png", None, "v2", False)


def test_a_volume_is_refused_by_its_header_before_its_voxels_are_read(app, tmp_path):
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((4096, 4096, 4096))
    header.set_data_dtype(np.int16)
    (tmp_path / "bomb.nii").write_bytes(header.binaryblock + b"\0" * 4)
    with pytest.raises(ValueError, match=r"4096 × 4096 × 4096 voxels; at most"):
        app.sessions.check_volume(tmp_path / "bomb.nii")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", b"PK\x03\x04", "archives are not opened"),
        ("a.nii.gz", b"PK\x03\x04", "archives are not opened"),
        ("a.dcm", b"0" * 128 + b"DICM", "one DICOM file"),
        ("a.png", b"\x89PNG", "no NIfTI file"),
        ("a.nii.gz", b"0" * 400, "damaged or misnamed"),
        ("a.nii", b"0" * 400, "cannot be read as NIfTI"),
        ("a.nii.gz", b"\x1f\x8b" + b"0" * 400, "cannot be read as NIfTI"),
    ],
)
def test_a_file_that_is_no_volume_is_refused(app, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        app.sessions.check_volume(tmp_path / name)
    assert str(tmp_path) not in str(refused.value)


def test_a_window_on_the_models_grid_covers_the_same_millimetres_on_the_scans(app):
    fine = np.diag([-1.0, -1.0, 1.0, 1.0])
    scan = app.slices.Scan("s", np.zeros((40, 40, 40), np.int16), None, fine, (1.0, 1.0, 1.0), ())
    coarse = np.diag([-4.0, -4.0, 2.0, 1.0])
    coarse[:3, 3] = -1.5, -1.5, 0.5  # the first coarse voxel covers fine ones 0 to 3 (x, y) and 0 to 1 (z)
    window = {"affine": coarse.tolist(), "start_dhw": (1, 2, 3), "size_dhw": (5, 2, 1)}
    assert app.slices.box_on_grid(window, scan) == ((2, 12), (8, 16), (12, 16))


def test_planes_look_from_the_feet_from_the_front_and_from_the_left(app):
    values = np.full((4, 4, 4), -1150, np.int16)
    values[3, 0, 0] = 350  # at the head, at the front, on the patient's right
    scan = app.slices.Scan("s", values, None, np.diag([-1.0, -1.0, 1.0, 1.0]), (1.0, 1.0, 1.0), ())
    for axis, place in ((app.slices.AXIAL, 3), (app.slices.CORONAL, 0), (app.slices.SAGITTAL, 0)):
        shown = _decoded(app.slices.plane_picture(scan, axis, place, "As the model sees", True, None, ""))
        assert shown[:50, :50].mean() > 200  # above and on the left of the view
        assert shown[-50:, -50:].mean() < 5


def _decoded(markup: str) -> np.ndarray:
    import base64
    import io
    import re

    from PIL import Image

    code = re.search(r"base64,([^\"]+)", markup)
    assert code is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code[1]))).convert("L"), float)


def test_names_in_tables_are_escaped(app):
    row = app.markup.Row('"><script>', "<img src=x onerror=alert(1)>", "<i>", [0.5, None], "<b>")
    shown = app.markup.score_table(["<u>"], [row], caption="<s>", note_title="n")
    assert not any(bad in shown for bad in ("<script", "<img", "<i>", "<b>", "<u>", "<s>"))


def _chosen(**changes: object) -> argparse.Namespace:
    values = {"conceptclip": [], "fvlm": [], "findings": None, "device": "cpu", "untrained": False}
    return argparse.Namespace(**{**values, "demo_output": Path("nowhere"), **changes})


def test_without_models_the_page_says_how_to_get_them_and_untrained_ones_are_named_as_such(app, tmp_path):
    models = app.demo_models.load_models(_chosen(), tmp_path)
    assert models.conceptclip == models.fvlm == {}
    assert "make demo" in app.demo_models.how_to_get("fvlm")
    untrained = app.demo_models.load_models(_chosen(untrained=True), tmp_path)
    assert untrained.untrained == ["untrained ConceptCLIP", "untrained fVLM"]
    assert not untrained.has_demo


def test_models_of_the_demo_are_told_to_know_drawings_alone(app, tmp_path, monkeypatch):
    folder = tmp_path / "fvlm" / "per_anatomy" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "fvlm"}')
    monkeypatch.setattr(app.demo_models, "load_pipeline", lambda *_, **__: None)
    models = app.demo_models.load_models(_chosen(demo_output=tmp_path), tmp_path)
    assert models.has_demo
    assert len(next(iter(models.fvlm.values())).findings) == 7


def test_two_folders_of_one_name_are_both_shown_and_neither_tells_the_servers_path(app, tmp_path):
    places = [str(tmp_path / user / "run" / "final") for user in "ab"]
    for place in places:
        Path(place).mkdir(parents=True)
    names = app.demo_models._short_names([*places, "owner/name"])
    assert list(names) == ["run/final", "run/final (2)", "owner/name"]
    assert list(names.values()) == [*places, "owner/name"]


def test_a_model_of_the_other_kind_is_refused(app, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "fvlm"}')
    with pytest.raises(ValueError, match="--conceptclip takes 'conceptclip'"):
        app.demo_models.load_models(_chosen(conceptclip=[str(folder)]), tmp_path)


def test_a_model_that_is_not_there_ends_the_command_with_a_sentence(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))  # the command sets some
    assert app.command.main(["--conceptclip", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.strip() == f"there is no folder {tmp_path / 'none'}."


def test_a_place_that_is_taken_ends_the_command_with_a_sentence(app, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", dict(os.environ))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.command.main(["--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"cannot listen at 127.0.0.1, port {port}: ")
    with pytest.raises(SystemExit):
        app.command.read_arguments(["--port", "99999"])


def test_the_page_imports_neither_training_nor_scripts():
    for file in APP.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("medclip_hf.training", "scripts"))], file


def test_the_page_listens_to_this_machine_alone_unless_told_otherwise(app, monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert app.command.read_arguments([]).host == "127.0.0.1"
    assert app.command.read_arguments(["--host", "0.0.0.0"]).host == "0.0.0.0"
    with pytest.raises(SystemExit):
        app.command.read_arguments(["--max-upload-mb", "0"])
