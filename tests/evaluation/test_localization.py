"""Pointing game, overlap and energy on maps whose peak can be seen by eye."""

import pytest
import torch

from medclip_hf.evaluation.localization import energy_inside, mask_share, overlap, pointing_game, upsample_maps

CORNER = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])


def quarter_mask(row: int, column: int) -> torch.Tensor:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    return mask


def test_a_peak_in_the_mask_is_a_hit_and_elsewhere_a_miss():
    assert pointing_game(CORNER, quarter_mask(0, 0)).item() == 1.0
    assert pointing_game(CORNER, quarter_mask(1, 1)).item() == 0.0


def test_the_peak_lies_at_the_centre_of_its_cell():
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    upsampled = upsample_maps(maps, (16, 16))
    peak = divmod(upsampled.argmax().item(), 16)
    assert peak[0] in (5, 6)  # cell 1 covers rows 4..7
    assert peak[1] in (9, 10)


def test_a_flat_map_hits_as_often_as_a_blind_guess():
    mask = quarter_mask(0, 0)
    assert pointing_game(torch.full((1, 3, 3), 0.3), mask).item() == pytest.approx(0.25)
    assert mask_share(mask).item() == 0.25


def test_tolerance_counts_a_near_miss():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0:2, 3] = True
    assert pointing_game(CORNER, mask).item() == 0.0
    assert pointing_game(CORNER, mask, tolerance_pixels=2).item() > 0.0


def test_shifting_and_scaling_a_map_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 4, 4, generator=generator)
    masks = torch.rand(5, 16, 16, generator=generator) > 0.5
    for figure in (pointing_game, overlap, energy_inside):
        torch.testing.assert_close(figure(3 * maps + 7, masks), figure(maps, masks), rtol=1e-4, atol=1e-4)


def test_overlap_of_a_map_that_is_the_mask_is_one():
    mask = quarter_mask(0, 1)
    assert overlap(mask.float(), mask).item() == 1.0
    assert energy_inside(mask.float(), mask).item() == 1.0


def test_overlap_counts_pixels_of_both():
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0] = True
    maps = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # one pixel shared, three in either
    assert overlap(maps, mask).item() == pytest.approx(1 / 3)
    assert energy_inside(maps, mask).item() == 0.5


@pytest.mark.parametrize("level", [0.0, 0.3, -2.0])
def test_a_flat_map_has_neither_overlap_nor_energy(level):
    flat = torch.full((1, 3, 3), level)
    assert overlap(flat, quarter_mask(0, 0)).item() == 0.0
    assert energy_inside(flat, quarter_mask(0, 0)).item() == 0.0


def test_a_case_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    maps, masks = torch.randn(4, 3, 3, generator=generator), torch.rand(4, 9, 9, generator=generator) > 0.6
    together = energy_inside(maps, masks)
    alone = torch.cat([energy_inside(maps[i : i + 1], masks[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("figure", [pointing_game, overlap, energy_inside])
def test_what_cannot_be_located_is_refused(figure):
    with pytest.raises(ValueError, match="1 of 1 masks are empty"):
        figure(CORNER, torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        figure(CORNER * torch.nan, quarter_mask(0, 0))
    with pytest.raises(ValueError, match="as many maps"):
        figure(CORNER, quarter_mask(0, 0).expand(2, 8, 8))


def test_senseless_options_are_refused():
    with pytest.raises(ValueError, match="tolerance_pixels"):
        pointing_game(CORNER, quarter_mask(0, 0), tolerance_pixels=-1)
    with pytest.raises(ValueError, match="threshold"):
        overlap(CORNER, quarter_mask(0, 0), threshold=0.0)
