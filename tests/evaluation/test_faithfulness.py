"""Deletion and insertion where the score is the brightness of one known patch."""

import pytest
import torch

from medclip_hf.evaluation.faithfulness import faithfulness_curves, faithfulness_figures
from medclip_hf.evaluation.localization import random_maps

SIDE, CELLS = 16, 4
HOT = (1, 2)


def bright_patch():
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    pixels[:, :, 4:8, 8:12] = 1.0
    return pixels


def score(pixels, cases):
    return pixels[:, :, 4:8, 8:12].mean(dim=(1, 2, 3))


def map_of(*cells):
    values = torch.zeros(2, CELLS, CELLS)
    for place, cell in enumerate(cells):
        values[:, cell[0], cell[1]] = float(len(cells) - place)
    return values


def test_a_true_map_makes_the_score_fall_and_rise_at_once():
    curves = faithfulness_curves(score, bright_patch(), map_of(HOT), num_steps=16, baseline="mean")
    assert curves.deletion[0, 0] == 1.0
    assert curves.deletion[0, 1:].tolist() == pytest.approx([1 / 16] * 16)  # the mean colour of the picture
    assert curves.insertion[0, 0] == pytest.approx(1 / 16)
    assert curves.insertion[0, 1:].tolist() == [1.0] * 16


def test_a_false_map_does_so_only_late():
    cold_first = -map_of(HOT)
    curves = faithfulness_curves(score, bright_patch(), cold_first, num_steps=16, baseline="mean")
    assert curves.deletion[0, :16].tolist() == [1.0] * 16
    assert curves.insertion[0, :16].tolist() == pytest.approx([1 / 16] * 16)


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_a_true_map_beats_a_random_order_and_a_false_one_does_not(baseline):
    pixels = bright_patch().repeat(10, 1, 1, 1)
    chance = faithfulness_curves(score, pixels, random_maps(20, (CELLS, CELLS)), baseline=baseline)
    for values, sign in ((map_of(HOT), 1), (-map_of(HOT), -1)):
        curves = faithfulness_curves(score, pixels, values.repeat(10, 1, 1), baseline=baseline)
        figures = faithfulness_figures(curves, chance, num_resamples=100)
        assert sign * figures.deletion_gain.value > 0.2
        assert sign * figures.insertion_gain.value > 0.2


def test_both_ends_are_the_picture_and_the_baseline():
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    curves = faithfulness_curves(score, pixels, torch.rand(2, CELLS, CELLS), num_steps=5)
    assert curves.deletion[:, 0].tolist() == pytest.approx(score(pixels, None).tolist())
    assert curves.insertion[:, -1].tolist() == curves.deletion[:, 0].tolist()
    assert curves.insertion[:, 0].tolist() == curves.deletion[:, -1].tolist()
    assert curves.shares.tolist() == pytest.approx([0, 3 / 16, 6 / 16, 10 / 16, 13 / 16, 1])


def test_the_curves_do_not_depend_on_the_batch():
    pixels, maps = torch.rand(2, 3, SIDE, SIDE), torch.rand(2, CELLS, CELLS)
    seen = []

    def counted(batch, cases):
        seen.append(len(batch))
        return score(batch, cases)

    large = faithfulness_curves(counted, pixels, maps, num_steps=4)
    assert seen == [20]  # 2 kinds × 2 pictures × 5 points in one pass
    small = faithfulness_curves(score, pixels, maps, num_steps=4, batch_size=3)
    torch.testing.assert_close(large.deletion, small.deletion)
    torch.testing.assert_close(large.insertion, small.insertion)


def test_what_cannot_be_measured_is_refused():
    pixels, maps = bright_patch(), map_of(HOT)
    with pytest.raises(ValueError, match="do not divide"):
        faithfulness_curves(score, pixels, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="finite"):
        faithfulness_curves(score, pixels, maps * torch.inf)
    with pytest.raises(ValueError, match="as many maps"):
        faithfulness_curves(score, pixels, maps[:1])
    with pytest.raises(ValueError, match="num_steps"):
        faithfulness_curves(score, pixels, maps, num_steps=17)
    with pytest.raises(ValueError, match="baseline"):
        faithfulness_curves(score, pixels, maps, baseline="black")
    with pytest.raises(ValueError, match="same cases"):
        faithfulness_figures(
            faithfulness_curves(score, pixels, maps, num_steps=2), faithfulness_curves(score, pixels, maps, num_steps=3)
        )
