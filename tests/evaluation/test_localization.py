"""Pointing game, overlap and energy on maps whose peak can be seen by eye."""

import pytest
import torch

from medclip_hf.evaluation.localization import (
    average_precision,
    best_threshold,
    case_figures,
    centre_prior,
    energy_inside,
    localization_figures,
    mask_share,
    overlap,
    overlap_at_thresholds,
    pointing_game,
    random_maps,
    upsample_maps,
)

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


def test_average_precision_is_scikit_learns():
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(6, 12, 12, generator=generator)
    maps[3:] = (4 * maps[3:]).round()  # ties
    masks = torch.rand(6, 12, 12, generator=generator) > 0.7
    expected = [
        average_precision_score(t.flatten().numpy(), m.flatten().numpy()) for m, t in zip(maps, masks, strict=True)
    ]
    torch.testing.assert_close(average_precision(maps, masks), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("level", [0.0, 0.3, -2.0])
def test_average_precision_of_a_flat_map_is_the_masks_share(level):
    assert average_precision(torch.full((1, 3, 3), level), quarter_mask(0, 0)).item() == pytest.approx(0.25)


def test_the_chosen_threshold_is_the_one_with_the_greatest_mean_overlap():
    maps = torch.tensor([[[1.0, 0.6], [0.3, 0.0]]])
    masks = torch.tensor([[[True, True], [False, False]]])
    assert overlap(maps, masks, threshold=best_threshold(maps, masks)).item() == 1.0
    assert overlap_at_thresholds(maps, masks, (0.2, 0.5, 0.9)).tolist() == [[pytest.approx(2 / 3), 1.0, 0.5]]
    assert 0.3 < best_threshold(maps, masks) <= 0.6


def test_perfect_maps_reach_one_and_random_maps_the_masks_share():
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(200, 16, 16, dtype=torch.bool)
    for mask, top, left in zip(masks, *torch.randint(0, 8, (2, 200), generator=generator).tolist(), strict=True):
        mask[top : top + 8, left : left + 8] = True
    names = ["a", "b"] * 100
    perfect = localization_figures(masks.float(), masks, names, num_resamples=50, chosen_threshold=0.5)
    for name in ("pointing", "iou_fixed", "iou_chosen", "iou_oracle", "auprc", "energy"):
        assert perfect.mean[name].value == pytest.approx(1.0), name
    blind = localization_figures(random_maps(200, (16, 16)), masks, names, num_resamples=200)
    for name in ("pointing", "auprc", "energy"):
        assert blind.mean[name].value == pytest.approx(0.25, abs=0.08), name
    assert blind.mean["pointing"].low < 0.25 < blind.mean["pointing"].high


def test_a_concept_counts_as_much_as_another_however_many_cases_it_has():
    masks = quarter_mask(0, 0).expand(4, 8, 8)
    maps = torch.cat([CORNER, CORNER, CORNER, CORNER.flip(1, 2)])
    figures = localization_figures(maps, masks, ["often", "often", "often", "rare"], num_resamples=0)
    assert figures.num_cases == {"often": 3, "rare": 1}
    assert figures.per_concept["often"]["pointing"].value == 1.0
    assert figures.mean["pointing"].value == 0.5


def test_cases_of_a_group_are_resampled_together():
    masks = quarter_mask(0, 0).expand(20, 8, 8)
    maps = torch.cat([CORNER] * 10 + [CORNER.flip(1, 2)] * 10)
    groups = [0] * 10 + [1] * 10
    apart = localization_figures(maps, masks, ["a"] * 20, num_resamples=200).mean["pointing"]
    together = localization_figures(maps, masks, ["a"] * 20, groups=groups, num_resamples=200).mean["pointing"]
    assert (together.low, together.high) == (0.0, 1.0)
    assert apart.low > 0.2


def test_figures_do_not_depend_on_how_many_cases_are_measured_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    maps, masks = torch.rand(5, 4, 4, generator=generator), torch.rand(5, 8, 8, generator=generator) > 0.5
    together = case_figures(maps, masks)
    monkeypatch.setattr("medclip_hf.evaluation.localization._PIXELS_AT_ONCE", 64)
    for name, values in case_figures(maps, masks).items():
        torch.testing.assert_close(values, together[name])


def test_the_centre_prior_peaks_in_the_middle():
    prior = centre_prior(2, (5, 7))
    assert prior.shape == (2, 5, 7)
    assert divmod(prior[1].argmax().item(), 7) == (2, 3)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least one case"):
        localization_figures(torch.zeros(0, 2, 2), torch.zeros(0, 4, 4), [])
    with pytest.raises(ValueError, match="at least one case"):
        localization_figures(CORNER, quarter_mask(0, 0), ["a", "b"])
    with pytest.raises(ValueError, match="without a case"):
        best_threshold(torch.zeros(0, 2, 2), torch.zeros(0, 4, 4))
