"""The web demo in a real browser, with tiny untrained models: what a visitor uploads, types, clicks, and what shows."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by pip install playwright")

APP = Path(__file__).resolve().parents[2] / "app"
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
MAX_UPLOAD_MB = 3
WAIT_MS = 60_000  # a loaded machine may be slow; nothing here takes a second on an idle one

pytestmark = [
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"there is no browser at {CHROMIUM}; set CHROMIUM"),
    # Looked for, not imported: the server is another process.
    pytest.mark.skipif(find_spec("gradio") is None, reason="the web demo needs pip install 'medclip-hf[app]'"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The running page: its url, and the folder below which it keeps everything."""
    folder = tmp_path_factory.mktemp("demo")
    sys.path.insert(0, str(APP))
    try:
        from examples import DRAWN_CT_FINDINGS
        from untrained import make_untrained
    finally:
        sys.path.remove(str(APP))
    models = [make_untrained("conceptclip", folder / name / "final", seed) for seed, name in enumerate(("one", "two"))]
    models.append(make_untrained("fvlm", folder / "ct" / "final"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = folder / "temporary"
    temporary.mkdir()
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    command = [
        sys.executable,
        APP / "app.py",
        "--conceptclip",
        models[0],
        "--conceptclip",
        models[1],
        "--fvlm",
        models[2],
    ]
    findings = folder / "findings.json"
    findings.write_text(json.dumps([asdict(finding) for finding in DRAWN_CT_FINDINGS]))
    command += ["--findings", findings, "--port", port, "--max-upload-mb", MAX_UPLOAD_MB]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, **quiet}
        )
        try:
            for _ in range(600):
                if "Open http" in (folder / "log").read_text() or server.poll() is not None:
                    break
                time.sleep(0.2)
            assert server.poll() is None, (folder / "log").read_text()
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", folder=folder, temporary=temporary)
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert not list(temporary.glob("medclip_hf_demo_*")), "what the server held is still there after its end"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, served) -> Iterator:
    """The open page; `page.foreign` lists requests to anywhere else."""
    opened = browser.new_page(viewport={"width": 1366, "height": 768})
    opened.set_default_timeout(WAIT_MS)
    opened.foreign = []
    opened.on("request", lambda request: _note_foreign(opened.foreign, request.url, served.url))
    opened.goto(served.url)
    opened.wait_for_selector("#picture-examples button")
    yield opened
    opened.close()


def _note_foreign(foreign: list[str], url: str, own: str) -> None:
    if not url.startswith((own, "data:", "blob:")):
        foreign.append(url)


def _pixels(page, view: str) -> np.ndarray:
    """The picture that stands in a view."""
    source = page.get_attribute(f"{view} img", "src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB"), float)


def _once(page, view: str, condition: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The picture of a view once a condition holds of it."""
    for _ in range(200):
        now = _pixels(page, view)
        if condition(now):
            return now
        page.wait_for_timeout(50)
    raise AssertionError(f"{view} never became what was expected")


def _changed(page, view: str, before: np.ndarray) -> np.ndarray:
    """The picture of a view once it is another than `before`."""
    return _once(page, view, lambda now: now.shape != before.shape or np.abs(now - before).mean() > 0.02)


def _error(page, place: str) -> str:
    page.wait_for_selector(f"{place} .mc-error")
    return page.inner_text(f"{place} .mc-error")


def _uploads(served) -> list[Path]:
    """Files with content that the server holds of visitors."""
    return [path for path in served.temporary.rglob("uploads/**/*") if path.is_file() and path.stat().st_size]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "figure.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def torso(tmp_path_factory) -> SimpleNamespace:
    """A drawn scan and its label file."""
    from medclip_hf.data.phantoms.torso_files import write_ct_rate
    from medclip_hf.data.phantoms.torsos import TorsoSettings

    folder = tmp_path_factory.mktemp("torso")
    settings = TorsoSettings(in_plane_size=48, slice_spacing_mm=(8.0, 8.0), max_studies=1, max_reconstructions=1)
    [scan] = write_ct_rate(folder, 1, split="valid", seed=1, orientations=("RAS",), settings=settings)
    relative = scan.relative_to(folder / "dataset")
    return SimpleNamespace(scan=scan, labels=folder / "dataset" / "ts_seg" / "ts_total" / relative)


def test_an_uploaded_picture_is_scored_for_a_concept_that_was_typed(page, picture):
    page.fill("#picture-concepts input", "left nodule <b>{{x}}</b>")
    page.press("#picture-concepts input", "Enter")
    page.set_input_files("#picture-upload input[type=file]", picture)
    page.wait_for_selector("#picture-table button")
    names = page.locator("#picture-table button").all_inner_texts()
    assert len(names) == 11
    assert "left nodule <b>{{x}}</b>" in names
    prompts = [float(text) for text in page.locator("#picture-prompt-table td").all_inner_texts()]
    assert sum(prompts) == pytest.approx(1.0, abs=0.03)


def test_another_concept_changes_the_heatmap_and_no_opacity_shows_the_bare_picture(page):
    page.click("#picture-examples button >> nth=0")
    page.wait_for_selector("#picture-table button")
    first = _pixels(page, "#picture-view")
    other = page.locator("#picture-table button").nth(3)
    other.focus()
    page.keyboard.press("Enter")  # a row is a button: the keyboard does what a click does
    second = _changed(page, "#picture-view", first)
    assert other.get_attribute("aria-pressed") == "true"
    assert other.inner_text() in page.inner_text("#picture-view figcaption")
    assert other.evaluate("row => row === document.activeElement")
    page.fill("#picture-opacity input[type=number]", "0")
    page.press("#picture-opacity input[type=number]", "Enter")
    bare = _changed(page, "#picture-view", second)
    assert np.abs(bare - first).mean() > 0.02
    other.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert np.array_equal(_pixels(page, "#picture-view"), bare)  # without opacity all concepts look alike


def test_after_many_quick_clicks_the_heatmap_is_that_of_the_marked_row(page):
    page.click("#picture-examples button >> nth=0")
    page.wait_for_selector("#picture-table button")
    page.evaluate("document.querySelectorAll('#picture-table button').forEach(row => row.click())")
    last = page.locator("#picture-table button").last
    assert last.get_attribute("aria-pressed") == "true"
    page.wait_for_selector(f"#picture-view figcaption:text('{last.inner_text()}:')")


def test_what_is_no_picture_is_refused_in_a_sentence_and_an_archive_is_not_opened(page, served, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    page.set_input_files("#picture-upload input[type=file]", tmp_path / "note.png")
    said = _error(page, "#picture-message")
    assert said.startswith("note.png cannot be read as a picture")
    assert str(served.temporary) not in said
    with zipfile.ZipFile(tmp_path / "escape.zip", "w") as archive:
        archive.writestr("../../escaped.txt", "out")
    page.reload()
    page.wait_for_selector("#picture-examples button")
    page.set_input_files("#picture-upload input[type=file]", tmp_path / "escape.zip")
    assert "archives are not opened" in _error(page, "#picture-message")
    assert not list(served.folder.rglob("escaped.txt"))


def test_a_picture_too_large_is_refused_before_it_is_sent(page, served, tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate((MAX_UPLOAD_MB + 1) * 2**20)
    page.set_input_files("#picture-upload input[type=file]", tmp_path / "huge.png")
    page.wait_for_selector(".toast-wrap :text('exceed')")
    assert not [path for path in _uploads(served) if path.name == "huge.png"]


def test_the_server_stops_reading_an_upload_that_is_too_large(served):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../big.png"\r\n\r\n'
    body += b"0" * ((MAX_UPLOAD_MB + 1) * 2**20) + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{served.url}/gradio_api/upload", data=body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
    assert not list(served.folder.rglob("big.png"))


def test_a_forged_path_is_answered_with_a_sentence(served):
    with urllib.request.urlopen(f"{served.url}/config") as answer:
        dependencies = json.load(answer)["dependencies"]
    upload = next(entry["id"] for entry in dependencies if entry["targets"] and entry["targets"][0][1] == "upload")
    forged = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    question = {"data": [forged, ["nodule"], [], "", 0.5], "fn_index": upload, "session_hash": "forged"}
    request = urllib.request.Request(f"{served.url}/gradio_api/queue/join", data=json.dumps(question).encode())
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{served.url}/gradio_api/queue/data?session_hash=forged") as answer:
        said = answer.read().decode()
    assert "the server could not use what was sent" in said
    assert "/etc/passwd" not in said


def test_a_dicom_file_is_shown_as_a_picture(page, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    path = get_testdata_file("CT_small.dcm", download=False)
    assert pydicom.dcmread(path).PatientName
    page.set_input_files("#picture-upload input[type=file]", path)
    page.wait_for_selector("#picture-table button")
    assert _pixels(page, "#picture-view").std() > 5


def test_uploads_go_when_the_page_is_closed(browser, served, picture):
    visitor = browser.new_page()
    visitor.goto(served.url)
    visitor.set_input_files("#picture-upload input[type=file]", picture)
    visitor.wait_for_selector("#picture-table button", timeout=WAIT_MS)
    assert [path for path in _uploads(served) if path.name == picture.name]
    visitor.close()
    for _ in range(150):
        if not [path for path in _uploads(served) if path.name == picture.name]:
            return
        time.sleep(0.2)
    raise AssertionError("the upload is still there half a minute after the page was closed")


def test_slices_scroll_and_a_finding_shows_its_window(page):
    page.get_by_role("tab", name="CT scan").click()
    page.click("#ct-examples button >> nth=0")
    page.wait_for_selector("#ct-table button")
    assert page.locator("#ct-table button").count() == 7
    assert page.locator("#ct-table td.mc-score").all_inner_texts() != []
    before = _pixels(page, "#ct-axial")
    page.locator("#ct-slider-axial input[type=range]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert _colourful(_changed(page, "#ct-axial", before))
    page.click("#ct-outlines input")
    bare = _once(page, "#ct-axial", lambda now: not _colourful(now))
    page.click("#ct-table button >> nth=0")
    page.wait_for_selector("#ct-window .mc-status")
    assert re.search(r"window that was scored, \d+ × \d+ × \d+ mm", page.inner_text("#ct-window"))
    framed = _changed(page, "#ct-axial", bare)
    assert (framed == 255).all(axis=2).sum() > 50  # the dashes
    page.click("#ct-run")  # scores the example once more, as after another model was chosen
    page.wait_for_selector("#ct-window:not(:has(.mc-status))", state="attached")
    assert "Scored by ct/final." in page.inner_text("#ct-message")


def _colourful(pixels: np.ndarray) -> bool:
    return bool((np.ptp(pixels, axis=2) > 30).any())


def test_a_scan_needs_its_mask_and_is_scored_with_it(page, torso):
    page.get_by_role("tab", name="CT scan").click()
    page.set_input_files("#ct-upload input[type=file]", torso.scan)
    page.wait_for_selector(f"#ct-upload :text('{torso.scan.name.split('.')[0]}')")
    page.click("#ct-run")
    assert "inside its mask" in _error(page, "#ct-message")
    page.set_input_files("#ct-mask input[type=file]", torso.labels)
    page.wait_for_selector(f"#ct-mask :text('{torso.labels.name.split('.')[0]}')")
    page.click("#ct-run")
    page.wait_for_selector("#ct-table button")
    assert torso.scan.name in page.inner_text("#ct-message")
    assert _colourful(_pixels(page, "#ct-coronal"))  # the outlines


def test_two_models_stand_side_by_side(page):
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-examples button >> nth=2")
    page.wait_for_selector("#compare-table button")
    left, right = _pixels(page, "#compare-left"), _pixels(page, "#compare-right")
    assert np.abs(left - right).mean() > 0.02
    page.click("#compare-table button >> nth=4")
    _changed(page, "#compare-left", left)
    _changed(page, "#compare-right", right)


def test_the_page_fits_a_phone_asks_nobody_else_and_says_what_it_is_not(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for tab in ("CT scan", "Compare", "Picture"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "Not a medical device" in page.inner_text("body")
    assert page.foreign == []
