"""medical-concept-annotation: concepts with identifiers, scores and places; carried with the model; clear refusals."""

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from medclip_hf.data.concepts.index import Concept
from medclip_hf.evaluation.concept_bank import ConceptBank, build_concept_bank
from medclip_hf.evaluation.encoders import load_encoder
from medclip_hf.evaluation.zero_shot import classify_images
from medclip_hf.pipelines import (
    ConceptAnnotationPipeline,
    add_pipelines,
    pipeline_concept_annotation,
    read_picture,
)
from medclip_hf.pipelines.pipeline_concept_annotation import box_of_map, is_dicom_file, read_concepts

TASK = "medical-concept-annotation"
CONCEPTS = ["nodule", ("effusion", "C0013687"), {"canonical_name": "chest", "concept_id": "C0817096"}]


@pytest.fixture(scope="module")
def annotate(conceptclip_folder):
    return pipeline(TASK, model=str(conceptclip_folder), device="cpu")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8))


def scores(entries):
    return {entry["label"]: entry["score"] for entry in entries}


def test_scores_are_those_of_the_zero_shot_protocol(annotate, picture):
    entries = annotate(picture, concepts=CONCEPTS, top_k=None)
    names = ["nodule", "effusion", "chest"]
    expected = classify_images(
        annotate.model, annotate.processor, [picture], names, ["{}"], activation="sigmoid", use_bias=True, top_patches=1
    )
    assert scores(entries) == pytest.approx(dict(zip(names, expected.mixed_scores[0], strict=True)), rel=1e-4)
    assert [entry["score"] for entry in entries] == sorted(scores(entries).values(), reverse=True)
    assert {entry["label"]: entry["cui"] for entry in entries} == {
        "nodule": None,
        "effusion": "C0013687",
        "chest": "C0817096",
    }


def test_maps_are_those_of_the_model_and_boxes_lie_in_the_image(annotate, picture):
    entry = annotate(picture, concepts=["left effusion"])[0]
    model, processor = annotate.model, annotate.processor
    with torch.no_grad():
        concepts = model.get_concept_embeds(**processor(text=["left effusion"])).flatten(0, 1)
        expected = model.get_concept_maps(**processor(images=picture), concept_embeds=concepts)[0, 0]
    np.testing.assert_allclose(entry["map"], expected.numpy(), atol=1e-5)
    left, top, right, bottom = entry["box"]
    assert 0 <= left < right <= 20
    assert 0 <= top < bottom <= 30


def test_batches_lists_and_generators_give_what_single_images_give(annotate, picture):
    images = [picture, picture.rotate(180), picture.resize((50, 11))]
    single = [scores(annotate(image, concepts=CONCEPTS)) for image in images]
    for found in (
        annotate(images, concepts=CONCEPTS, batch_size=2),
        annotate(tuple(images), concepts=CONCEPTS),
        list(annotate((image for image in images), concepts=CONCEPTS, batch_size=2)),
    ):
        assert [scores(entries) for entries in found] == [pytest.approx(one, rel=1e-4) for one in single]
    assert annotate([], concepts=CONCEPTS) == annotate((), concepts=CONCEPTS) == []


def test_a_picture_may_come_as_a_data_url(annotate, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    found = annotate(f"data:image/png;base64,{content}", concepts=CONCEPTS)
    assert scores(found) == pytest.approx(scores(annotate(picture, concepts=CONCEPTS)))
    assert not is_dicom_file(f"data:image/png;base64,{content}")
    with pytest.raises(ValueError, match="is not a file"):
        annotate(content, concepts=CONCEPTS)


def test_a_picture_of_16_bits_is_scaled_for_the_stock_pipelines_too(conceptclip_folder, tmp_path):
    """What transformers itself reads of it is white nearly everywhere."""
    grey = np.arange(400, dtype=np.uint16).reshape(20, 20) * 163
    Image.fromarray(grey).save(tmp_path / "grey.png")
    embed = pipeline("image-feature-extraction", model=str(conceptclip_folder), device="cpu")
    expected = embed(Image.fromarray(np.rint(grey / 257).astype(np.uint8)))
    assert np.allclose(embed(read_picture(tmp_path / "grey.png")), expected, atol=1e-3)
    assert not np.allclose(embed(str(tmp_path / "grey.png")), expected, atol=1e-3)


def test_a_concept_bank_gives_what_its_names_give(annotate, picture, conceptclip_folder, tmp_path):
    encoder = load_encoder(conceptclip_folder, device="cpu")
    concepts = [Concept("C1", "nodule"), Concept("C2", "left effusion")]
    build_concept_bank(encoder, concepts).save(tmp_path / "bank")
    bank = ConceptBank.load(tmp_path / "bank", encoder)
    found = annotate(picture, concepts=bank)
    assert scores(found) == pytest.approx(scores(annotate(picture, concepts=["nodule", "left effusion"])), rel=1e-4)
    assert {entry["label"]: entry["cui"] for entry in found} == {"nodule": "C1", "left effusion": "C2"}


def test_a_threshold_may_leave_nothing(annotate, picture):
    assert annotate(picture, concepts=CONCEPTS, threshold=0.999999) == []
    assert annotate([picture, picture], concepts=CONCEPTS, threshold=0.999999, batch_size=2) == [[], []]


def test_the_shipped_vocabulary_is_taken_where_none_is_named(annotate, picture):
    entries = annotate(picture, top_k=3)
    assert len(entries) == 3
    assert all(entry["cui"] for entry in entries)


def test_a_dicom_file_is_read_as_a_viewer_shows_it(annotate, picture, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    grey = np.asarray(picture.convert("L"))
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *grey.shape, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PhotometricInterpretation = "MONOCHROME1"  # 0 is white
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = np.rint((255 - grey.astype(float)) / 255 * 4095).astype(np.uint16).tobytes()
    dataset.save_as(tmp_path / "radiograph.dcm", enforce_file_format=True)
    expected = scores(annotate(Image.fromarray(grey), concepts=CONCEPTS))
    assert scores(annotate(str(tmp_path / "radiograph.dcm"), concepts=CONCEPTS)) == pytest.approx(expected, rel=0.02)


def test_another_number_format_is_taken(conceptclip_folder, picture):
    half = pipeline(TASK, model=str(conceptclip_folder), dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    assert len(half(picture, concepts=CONCEPTS)) == 3


# Saving ----------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_holds_processor_and_code_and_needs_no_trust_where_the_package_is(annotate, picture, tmp_path):
    annotate.save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"), device="cpu")
    assert type(again) is ConceptAnnotationPipeline
    assert scores(again(picture, concepts=CONCEPTS)) == scores(annotate(picture, concepts=CONCEPTS))
    AutoProcessor.from_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["custom_pipelines"][TASK]["impl"] == "pipeline_concept_annotation.ConceptAnnotationPipeline"
    AutoModel.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "model_alone")
    assert not list((tmp_path / "model_alone").glob("pipeline_*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "model_alone" / "config.json").read_text())


def test_any_saved_model_can_be_given_its_pipelines(conceptclip_folder, tmp_path):
    folder = shutil.copytree(conceptclip_folder, tmp_path / "copy")
    add_pipelines(folder)
    assert {"pipeline_concept_annotation.py", "pipeline_saving.py", "zero_shot.py"} <= {
        path.name for path in folder.glob("*.py")
    }
    assert json.loads((folder / "config.json").read_text())["custom_pipelines"].keys() == {TASK}
    with pytest.raises(ValueError, match="holds no model with pipelines"):
        add_pipelines(tmp_path)


STRANGER = """
import json, sys
import shutil
import numpy as np
from transformers import pipeline
task, first, second, image, result = sys.argv[1:]
try:
    pipeline(task, model=first)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
pixels = np.load(image)
concepts = ["nodule", ["effusion", "C0013687"]]
found = []
for folder in (first, second):
    annotate = pipeline(task, model=folder, trust_remote_code=True)
    found.append([(e["label"], e["cui"], e["score"], e["box"]) for e in annotate(pixels, concepts=concepts)])
    if folder == first:
        annotate.save_pretrained(second)
        annotate.model.save_pretrained(second + "_model_alone")
assert found[0] == found[1], found
try:
    annotate(pixels)
except ValueError as error:
    assert "concepts=[...]" in str(error), error
open(image + ".dcm", "wb").write(bytes(128) + b"DICM")
try:
    annotate(image + ".dcm", concepts=concepts)
except ValueError as error:
    assert "medclip-hf[ct]" in str(error), error
json.dump(found[0], open(result, "w"))
"""


def test_it_works_the_same_where_the_package_is_absent_and_saves_from_there(
    annotate, picture, tmp_path, run_without_package
):
    annotate.save_pretrained(tmp_path / "first")
    np.save(tmp_path / "image.npy", np.asarray(picture))
    run_without_package(
        STRANGER, TASK, tmp_path / "first", tmp_path / "second", tmp_path / "image.npy", tmp_path / "result.json"
    )
    here = annotate(picture, concepts=["nodule", ("effusion", "C0013687")])
    there = json.loads((tmp_path / "result.json").read_text())
    assert {entry[0]: entry[2] for entry in there} == pytest.approx(scores(here), rel=1e-5)
    assert [entry[3] for entry in there] == [list(entry["box"]) for entry in here]


# Parts and bad input ---------------------------------------------------------------------------------------------


def test_a_box_holds_the_part_around_the_peak_and_not_another_island():
    concept_map = np.zeros((4, 4))
    concept_map[0, 0], concept_map[3, 2], concept_map[3, 3] = 0.9, 1.0, 0.6
    assert box_of_map(concept_map, (40, 80)) == (20, 60, 40, 80)


def test_concepts_come_from_lists_and_files_and_the_first_of_equal_names_counts(tmp_path):
    path = tmp_path / "concepts.jsonl"
    path.write_text(
        '{"concept_id": "C1", "canonical_name": "mass"}\n\n{"concept_id": "C2", "canonical_name": "mass"}\n'
    )
    assert read_concepts(path) == (("mass", "C1"),)
    assert read_concepts(["cyst", ("cyst", "C3")]) == (("cyst", None),)


def test_a_file_of_concepts_is_read_once_a_call_and_not_once_an_image(annotate, picture, tmp_path, monkeypatch):
    path = tmp_path / "concepts.jsonl"
    path.write_text('{"concept_id": "C1", "canonical_name": "nodule"}\n')
    read, lines_of = [], pipeline_concept_annotation._read_lines
    monkeypatch.setattr(pipeline_concept_annotation, "_read_lines", lambda path: read.append(path) or lines_of(path))
    assert [entries[0]["cui"] for entries in annotate([picture] * 3, concepts=path)] == ["C1"] * 3
    assert read == [path]


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "concepts is empty"),
        ([""], "is no concept"),
        ([3], "is no concept"),
        ([{"name": "mass"}], "is no concept"),
        ("absent.jsonl", "is no file"),
    ],
)
def test_what_is_no_concept_is_refused(annotate, picture, concepts, message):
    with pytest.raises(ValueError, match=message):
        annotate(picture, concepts=concepts)


def test_a_file_that_is_no_image_and_a_misspelt_argument_are_refused(annotate, picture, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png cannot be opened as an image"):
        annotate(str(tmp_path / "notes.png"), concepts=CONCEPTS)
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x00" * 40)
    with pytest.raises(ValueError, match=r"broken\.dcm cannot be shown as a picture"):
        annotate(str(tmp_path / "broken.dcm"), concepts=CONCEPTS)
    with pytest.raises(ValueError, match=r"knows no \['concept'\]"):
        annotate(picture, concept=["nodule"])
    with pytest.raises(ValueError, match="top_k must be a whole number of 1 or more"):
        annotate(picture, concepts=CONCEPTS, top_k=0)


def test_another_model_is_refused(fvlm_folder):
    with pytest.raises(ValueError, match="needs a ConceptCLIP"):
        pipeline(TASK, model=str(fvlm_folder), device="cpu")
