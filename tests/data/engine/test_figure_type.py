"""Pictures and drawings, and the modality that a caption names."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from medclip_hf.data.engine.figure_type import MAX_BLANK_SHARE, MODALITIES, FigureRules, blank_share, named_modality
from medclip_hf.data.phantoms.figures import draw_figures
from medclip_hf.data.phantoms.looks import LOOKS


def bar_chart():
    image = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.line([(40, 20), (40, 260), (380, 260)], fill="black", width=2)
    for number in range(6):
        draw.rectangle([60 + 50 * number, 240 - 30 * number, 90 + 50 * number, 260], fill="steelblue")
    return image


def flow_chart():
    image = Image.new("RGB", (400, 300), (230, 240, 250))
    draw = ImageDraw.Draw(image)
    for number in range(3):
        draw.rounded_rectangle([30 + 120 * number, 100, 120 + 120 * number, 180], 10, fill="orange", outline="black")
        draw.text((45 + 120 * number, 130), "patients")
    return image


@pytest.mark.parametrize("draw", [bar_chart, flow_chart])
def test_drawings_are_mostly_blank(draw):
    assert blank_share(draw()) > MAX_BLANK_SHARE


def test_drawn_medical_phantoms_are_pictures():
    assert all(blank_share(Image.fromarray(figure.image)) < MAX_BLANK_SHARE for figure in draw_figures(0, "train", 20))


def test_a_scan_on_black_background_is_a_picture():
    pixels = np.zeros((200, 200), np.uint8)
    pixels[60:140, 60:140] = np.random.default_rng(0).integers(60, 200, (80, 80))
    assert blank_share(Image.fromarray(pixels).convert("RGB")) < MAX_BLANK_SHARE


@pytest.mark.parametrize("size", [(1, 1), (2, 500), (500, 2)])
def test_tiny_images_are_judged_without_complaint(size):
    assert blank_share(Image.new("RGB", size, "white")) == 1.0


@pytest.mark.parametrize(
    ("caption", "modality"),
    [
        ("Axial CT scans of the chest", "computed tomography"),
        ("T2-weighted image of the knee", "magnetic resonance"),
        ("Chest x-rays before and after", "radiograph"),
        ("Chest X-ray", "radiograph"),
        ("Transvaginal sonogram", "ultrasound"),
        ("Mammograms of both breasts", "mammography"),
        ("Immunohistochemical staining for Ki-67", "histology"),
        ("Dermoscopic image of a naevus", "dermoscopy"),
        ("Color fundus photograph", "fundus photography"),
        ("SD-OCT of the macula", "optical coherence tomography"),
        ("Colonoscopy: a polyp", "endoscopy"),
        ("Kaplan-Meier curves", ""),
        ("We collected the act of direct contact", ""),
        ("", ""),
    ],
)
def test_the_modality_is_the_one_that_the_caption_names(caption, modality):
    assert named_modality(caption) == modality


def test_the_modality_named_most_often_wins():
    assert named_modality("CT and MRI of the brain; MRI shows oedema") == "magnetic resonance"


def test_the_phantoms_name_modalities_by_the_same_words():
    assert {look.modality for look in LOOKS} <= set(MODALITIES)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.modality)
def test_the_names_of_the_phantoms_are_understood(look):
    assert {named_modality(name) for name in look.names} == {look.modality}


def test_an_unknown_wish_is_refused():
    with pytest.raises(ValueError, match="keep must be 'medical', 'pictures' or 'all'"):
        FigureRules(keep="photos")


def test_real_figures_are_told_apart(real_data):
    folder = real_data / "pmc_sample" / "images"
    shares = [
        blank_share(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) for path in sorted(folder.iterdir())
    ]
    pictures, drawings = [5, 10, 11, 15, 21, 24, 28, 44, 55, 64], [3, 7, 14, 20, 29, 40, 57, 58, 66, 68]
    assert all(shares[number] <= MAX_BLANK_SHARE for number in pictures)
    assert all(shares[number] > MAX_BLANK_SHARE for number in drawings)
