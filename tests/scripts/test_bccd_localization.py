"""The experiment on blood smears, shortened: maps are stitched as the tiles lie, mistakes are refused."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def script(repository):
    path = repository / "scripts" / "bccd_localization.py"
    specification = importlib.util.spec_from_file_location("bccd_localization", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_stitched_maps_lie_as_the_picture_does(script):
    class Smear:
        def image(self):
            pixels = np.arange(480)[:, None] // 20 * 32 + np.arange(640) // 20  # number of the cell of 20 × 20 pixels
            return Image.fromarray(pixels.astype(np.int32))

    tiles = [torch.from_numpy(np.array(tile)[::20, ::20].copy()) for tile in script.tiles_of(Smear())]
    stitched = script.stitch(torch.stack(tiles)[:, None])
    assert torch.equal(stitched[0], torch.arange(24 * 32).view(24, 32).int())


def test_the_mean_over_concepts_is_not_the_mean_over_cases(script):
    assert script.macro(torch.tensor([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]) == 0.5


def test_mistakes_end_with_code_2_and_one_sentence(script, tmp_path, capsys):
    assert script.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "train.txt is missing" in capsys.readouterr().err
    assert script.main(["--data", str(tmp_path), "--seeds", "0"]) == 2
    assert "--seeds" in capsys.readouterr().err
