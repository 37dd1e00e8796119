"""CT findings as pictures: right slices, outlines where the masks are, bad input refused."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from medclip_hf.explain import ct_overlay
from medclip_hf.explain.ct_overlay import (
    ANATOMY_COLOUR,
    FINDING_COLOUR,
    ScoredFinding,
    best_slice,
    draw_ct_finding,
    draw_ct_map,
)

SHAPE = (12, 16, 20)
SPACING = (3.0, 1.0, 1.0)


def box(*bounds):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(start, end) for start, end in bounds)] = True
    return mask


LUNG = box((2, 10), (3, 13), (4, 12))
NODULE = box((4, 6), (5, 8), (6, 9))
IMAGE = np.where(LUNG, -850, 40).astype(np.int16)
SCORED = ScoredFinding("Lung nodule", "lung", 0.87, is_present=True)


def draw(image=IMAGE, anatomy=LUNG, finding=SCORED, **options):
    return draw_ct_finding(image, anatomy, finding, **({"spacing_mm_dhw": SPACING} | options))


def num_pixels(picture, colour):
    wanted = np.round(255 * np.array(to_rgb(colour)))
    return int((np.abs(picture.astype(int) - wanted).max(axis=-1) < 60).sum())


def test_the_slice_with_most_of_the_mask_is_shown():
    mask = box((3, 4), (0, 4), (0, 4)) | box((7, 8), (0, 8), (0, 8))
    assert best_slice(mask, axis=0) == 7
    assert best_slice(LUNG, axis=1) == 8  # the middle of equal ones
    assert best_slice(np.zeros(SHAPE, bool), axis=0) == 6


def test_the_anatomy_is_outlined_and_the_finding_where_its_region_is_known():
    plain, known = draw(), draw(finding_mask=NODULE)
    assert plain.dtype == np.uint8
    assert plain.shape[2] == 3
    assert num_pixels(plain, ANATOMY_COLOUR) > 200
    assert num_pixels(known, FINDING_COLOUR) > num_pixels(plain, FINDING_COLOUR) + 50


def test_an_anatomy_that_does_not_occur_is_drawn_without_outline():
    missing = ScoredFinding("Lung nodule", "lung", None)
    assert draw(anatomy=np.zeros(SHAPE, bool), finding=missing).shape[2] == 3


def test_views_keep_their_proportions_in_millimetres():
    assert draw(spacing_mm_dhw=(2, 1, 1)).shape[0] > draw(spacing_mm_dhw=(1, 1, 1)).shape[0]


@pytest.mark.parametrize(
    ("finding", "headline"),
    [
        (SCORED, "Lung nodule (lung): probability 0.87, truth: present"),
        (ScoredFinding("Lung nodule", "lung", 0.1, False), "Lung nodule (lung): probability 0.10, truth: absent"),
        (ScoredFinding("Lung nodule", "lung", None), "Lung nodule (lung): not scored"),
    ],
)
def test_the_headline_tells_score_and_truth(finding, headline):
    assert finding.headline() == headline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anatomy": LUNG[:, :-1]}, "one grid"),
        ({"finding_mask": NODULE[0]}, "one grid"),
        ({"image": IMAGE[0], "anatomy": LUNG[0]}, "one grid"),
        ({"window_hu": (350.0, -1150.0)}, "window_hu"),
        ({"spacing_mm_dhw": (3, 0, 1)}, "spacing_mm_dhw"),
        ({"spacing_mm_dhw": (3, 1)}, "spacing_mm_dhw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def map_at(place, value=1.0):
    values = np.zeros(SHAPE, np.float32)
    values[place] = value
    return values


def draw_map(values, **options):
    return draw_ct_map(IMAGE, values, **({"spacing_mm_dhw": SPACING, "title": "similarity"} | options))


def test_a_map_is_drawn_on_three_planes_and_their_projections():
    plain, marked = draw_map(np.zeros(SHAPE, np.float32)), draw_map(map_at((5, 6, 7)))
    assert plain.shape == marked.shape
    assert plain.shape[2] == 3
    assert (plain != marked).any()


def test_the_sagittal_view_runs_from_front_to_back_and_from_head_to_feet():
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    view = ct_overlay._view(volume, ct_overlay._SAGITTAL, 4)
    assert view.shape == (SHAPE[0], SHAPE[1])
    assert view[0, 0] == volume[-1, 0, 4]
    assert view[-1, -1] == volume[0, -1, 4]


def test_a_patch_map_is_brought_to_the_scans_grid():
    patches = np.zeros((3, 4, 5), np.float32)
    patches[1, 2, 3] = 1.0
    fine = ct_overlay._on_scan_grid(patches, SHAPE)
    assert fine.shape == SHAPE
    peak = np.unravel_index(fine.argmax(), SHAPE)
    assert [place // 4 for place in peak] == [1, 2, 3]
    assert draw_map(patches).dtype == np.uint8


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros((30, 30, 30)), {}, "at most the scan's"),
        (np.zeros((3, 4)), {}, "depth, height, width"),
        (np.full(SHAPE, np.nan), {}, "not finite"),
        (np.zeros(SHAPE), {"value_range": (1.0, 0.0)}, "must rise"),
        (np.zeros(SHAPE), {"outline": LUNG[0]}, "one grid"),
    ],
)
def test_a_map_that_cannot_be_drawn_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        draw_map(values, **options)
