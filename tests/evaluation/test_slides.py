"""Whole-slide images: what is a tile, what is set aside, what an attention classifier finds, and where it looks."""

import numpy as np
import pytest
import tifffile
import torch

from medclip_hf.evaluation import slides
from medclip_hf.evaluation.multiple_instance import (
    AttentionMIL,
    MILSettings,
    macro_auroc,
    predict_slides,
    train_mil,
)
from medclip_hf.evaluation.slides import (
    SlideRow,
    TileContract,
    UnusableSlide,
    attention_map,
    embed_slide,
    feature_identity,
    find_tiles,
    has_features,
    load_features,
    open_slide,
    read_slide_table,
    read_tile,
    save_features,
    slide_mpp,
)

PAPER, PINK, PURPLE = (246, 245, 247), (225, 160, 195), (110, 60, 140)


def draw(rows: int, columns: int, tissue: list[tuple[int, int]], tumour=(), side: int = 64) -> np.ndarray:
    """A picture of tiles: glass, tissue in pink, tumour in purple."""
    rng = np.random.default_rng(0)
    picture = np.empty((rows * side, columns * side, 3), dtype=np.int16)
    picture[:] = PAPER
    for colour, places in ((PINK, tissue), (PURPLE, tumour)):
        for row, column in places:
            picture[row * side : (row + 1) * side, column * side : (column + 1) * side] = colour
    return np.clip(picture + rng.integers(-6, 7, picture.shape), 0, 255).astype(np.uint8)


def write_slide(path, picture: np.ndarray, mpp: float | tuple[float, float] | None = 0.5):
    """A pyramidal TIFF of three levels."""
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    with tifffile.TiffWriter(path) as file:
        for level, step in enumerate((1, 2, 4)):
            options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib", "metadata": None}
            if mpp is not None:
                options |= {"resolution": (1e4 / x / step, 1e4 / y / step), "resolutionunit": "CENTIMETER"}
            file.write(picture[::step, ::step], subfiletype=1 if level else 0, **options)
    return path


def row_of(path, **changes) -> SlideRow:
    return SlideRow(**{"slide_id": "s", "path": path, "label": "a", "split": "test", "patient_id": "p"} | changes)


def mean_colour(tiles) -> torch.Tensor:
    """The simplest encoder: what a tile looks like on average, in [0, 1]."""
    return torch.stack([torch.tensor(np.asarray(tile) / 255.0).mean(dim=(0, 1)) for tile in tiles])


CONTRACT = TileContract(tile_px=64, mpp=0.5)


@pytest.mark.parametrize("library", ["openslide", "tiffslide"])
def test_tiles_of_tissue_are_found_where_they_were_drawn(tmp_path, monkeypatch, library):
    if library == "tiffslide":
        monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    tissue = [(0, 1), (2, 3), (3, 0)]
    path = write_slide(tmp_path / "a.tif", draw(4, 5, tissue))
    found = embed_slide(row_of(path), mean_colour, CONTRACT, batch_size=2)
    assert found.places.tolist() == [[0, 1], [2, 3], [3, 0]]
    assert found.shape == (4, 5)
    assert found.overview.shape == (32, 40, 3)
    torch.testing.assert_close(found.features * 255, torch.tensor([PINK] * 3).float(), atol=1.5, rtol=0)


def test_a_tile_is_as_many_micrometres_wide_whatever_the_slide_s_own_resolution(tmp_path):
    tissue = [(0, 1), (1, 0)]
    fine = write_slide(tmp_path / "fine.tif", draw(4, 4, tissue, side=128), mpp=0.25)
    usual = write_slide(tmp_path / "usual.tif", draw(4, 4, tissue, side=64), mpp=0.5)
    for path in (fine, usual):
        slide = open_slide(path)
        grid = find_tiles(slide, "s", CONTRACT, slide_mpp(slide, "s"))
        assert grid.places.tolist() == [[0, 1], [1, 0]]
        tile = read_tile(slide, "s", grid, (0, 1), 64)
        assert tile.size == (64, 64)
        assert np.abs(np.asarray(tile).reshape(-1, 3).mean(axis=0) - PINK).max() < 2


def test_magnifications_that_divide_by_no_power_of_two_keep_the_grid(tmp_path):
    path = write_slide(tmp_path / "a.tif", draw(8, 8, [(5, 6)], side=100), mpp=0.32)
    found = embed_slide(row_of(path), mean_colour, CONTRACT)
    assert found.places.tolist() == [[5, 6]]
    torch.testing.assert_close(found.features * 255, torch.tensor([PINK]).float(), atol=3, rtol=0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: write_slide(path, draw(4, 4, [])), "no tissue"),
        (lambda path: write_slide(path, np.zeros((256, 256, 3), np.uint8)), "no tissue"),
        (lambda path: write_slide(path, draw(4, 4, [(0, 0)]), mpp=None), "slide without mpp"),
        (lambda path: write_slide(path, draw(4, 4, [(0, 0)]), mpp=(0.5, 0.25)), "pixels not square"),
        (lambda path: write_slide(path, draw(4, 4, [(0, 0)]), mpp=1.0), "slide too coarse"),
        (lambda path: write_slide(path, draw(4, 4, [(0, 0)], side=12)), "slide smaller than a tile"),
        (lambda path: path.write_bytes(b"II*\0 no slide"), "slide unreadable"),
        (lambda path: None, "slide missing"),
    ],
)
def test_a_slide_that_cannot_be_used_says_why(tmp_path, make, reason):
    make(tmp_path / "a.tif")
    with pytest.raises(UnusableSlide) as error:
        embed_slide(row_of(tmp_path / "a.tif"), mean_colour, CONTRACT)
    assert error.value.reason == reason


def test_a_slide_whose_pixels_are_damaged_is_set_aside_whole(tmp_path):
    path = write_slide(tmp_path / "a.tif", draw(8, 8, [(r, c) for r in range(8) for c in range(8)]))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = b"\xff" * count
    path.write_bytes(content)
    with pytest.raises(UnusableSlide, match="slide damaged"):
        embed_slide(row_of(path), mean_colour, CONTRACT)


def test_the_user_may_tell_the_resolution_but_not_contradict_the_file(tmp_path):
    silent = write_slide(tmp_path / "silent.tif", draw(4, 4, [(1, 1)]), mpp=None)
    assert embed_slide(row_of(silent, mpp=0.5), mean_colour, CONTRACT).places.tolist() == [[1, 1]]
    speaking = write_slide(tmp_path / "speaking.tif", draw(4, 4, [(1, 1)]), mpp=0.5)
    with pytest.raises(UnusableSlide, match="mpp contradicted"):
        embed_slide(row_of(speaking, mpp=0.25), mean_colour, CONTRACT)


def test_without_a_reader_the_extra_is_named(tmp_path, monkeypatch):
    for package in ("openslide", "tiffslide"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    path = write_slide(tmp_path / "a.tif", draw(2, 2, []))
    with pytest.raises(ImportError, match=r"medclip-hf\[wsi\]"):
        open_slide(path)


def test_a_slide_without_an_overview_level_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "MAX_OVERVIEW_PIXELS", 100)
    path = write_slide(tmp_path / "a.tif", draw(4, 4, [(0, 0)]))
    with pytest.raises(UnusableSlide, match="without an overview level"):
        embed_slide(row_of(path), mean_colour, CONTRACT)


def test_features_are_found_again_only_for_the_same_slide_contract_and_encoder(tmp_path):
    path = write_slide(tmp_path / "a.tif", draw(4, 4, [(1, 1)]))
    row, target = row_of(path), tmp_path / "features" / "s.safetensors"
    identity = feature_identity(row, CONTRACT, "encoder")
    found = embed_slide(row, mean_colour, CONTRACT)
    save_features(target, found, identity)
    again = load_features(target, identity)
    assert torch.equal(again.features, found.features)
    assert again.shape == (4, 4)
    assert has_features(target, identity)
    for other in (
        feature_identity(row, TileContract(64, 0.5, 0.9), "encoder"),
        feature_identity(row, CONTRACT, "other"),
    ):
        assert load_features(target, other) is None
        assert not has_features(target, other)
    for size in (-1, 50):  # cut short in its vectors, and in its header
        target.write_bytes(target.read_bytes()[:size])
        assert load_features(target, identity) is None
        assert not has_features(target, identity)
    assert not has_features(tmp_path / "none", identity)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide_id,path,label\na,a.tif,x\n", "lacks the columns"),
        ("slide_id,path,label,split\n", "names no slide"),
        ("slide_id,path,label,split\na,a.tif,x,dev\n", "line 2: split 'dev'"),
        ("slide_id,path,label,split\na,a.tif,,train\n", "line 2: label is empty"),
        ("slide_id,path,label,split\na,a.tif,x,\n", "line 2: split is empty"),
        ("slide_id,path,label,split\n../a,a.tif,x,train\n", "cannot name a file"),
        ("slide_id,path,label,split\na,a.tif,x,train\na,b.tif,x,train\n", "more than once"),
        ("slide_id,path,label,split\na,a.tif,x,train\nb,a.tif,x,test\n", "same path in several splits"),
        ("slide_id,path,label,split,patient_id\na,a.tif,x,train,p\nb,b.tif,x,val,p\n", "same patient_id in several"),
        ("slide_id,path,label,split,mpp\na,a.tif,x,train,half\n", "is no number"),
        ("slide_id,path,label,split,mpp\na,a.tif,x,train,-1\n", "must be positive"),
    ],
)
def test_a_table_that_cannot_be_used_names_its_line(tmp_path, text, told):
    (tmp_path / "slides.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_slide_table(tmp_path / "slides.csv")


def test_both_names_of_the_validation_split_are_one(tmp_path):
    text = "slide_id,path,label,split\na,a.tif,x,validation\nb,b.tif,x,val\n"
    (tmp_path / "slides.csv").write_text(text)
    assert [row.split for row in read_slide_table(tmp_path / "slides.csv")] == ["validation", "validation"]


def make_bags(count: int, seed: int, num_tiles: int = 12, num_features: int = 6):
    """Slides of noise; one tile of a positive slide has a mark in its first feature. Bags and the marked places."""
    rng = np.random.default_rng(seed)
    bags, marked = [], []
    for number in range(count):
        features = rng.normal(size=(num_tiles, num_features)).astype(np.float32)
        place = int(rng.integers(num_tiles))
        features[place, 0] = 6.0 if number % 2 else features[place, 0]
        tensor = torch.from_numpy(features)
        bags.append((lambda tensor=tensor: tensor, number % 2))
        marked.append(place)
    return bags, marked


@pytest.mark.parametrize("gated", [False, True])
def test_one_marked_tile_of_twelve_tells_the_slide_and_holds_the_attention(gated, tmp_path):
    settings = MILSettings(hidden_dim=16, attention_dim=8, gated=gated, learning_rate=1e-2, num_epochs=15)
    train, _ = make_bags(50, 0)
    validation, _ = make_bags(20, 1)
    test, marked = make_bags(40, 2)
    model, history = train_mil(train, validation, ["clear", "tumour"], settings, seed=3)
    assert history[0].keys() == {"epoch", "train_loss", "validation_auroc", "validation_loss"}
    found = predict_slides(model, test)
    assert macro_auroc(found, [label for _, label in test]) > 0.98
    hits = [found[n].attention.argmax() == marked[n] for n in range(1, 40, 2)]
    assert np.mean(hits) > 0.9
    model.save(tmp_path / "mil.safetensors")
    again = predict_slides(AttentionMIL.load(tmp_path / "mil.safetensors"), test)
    assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(found, again, strict=True))


def test_equal_seeds_give_equal_classifiers_and_leave_the_caller_s_random_numbers_alone():
    train, _ = make_bags(8, 0)
    settings = MILSettings(hidden_dim=4, attention_dim=2, num_epochs=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_mil(train, train, ["a", "b"], settings, seed=1)[0]
    assert torch.equal(torch.rand(3), expected)
    second = train_mil(train, train, ["a", "b"], settings, seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_attention_sums_to_one_and_does_not_depend_on_the_order_of_tiles():
    torch.manual_seed(0)
    model = AttentionMIL(5, ["a", "b"], MILSettings(hidden_dim=8, attention_dim=4)).eval()
    features = torch.randn(7, 5)
    logits, attention = model(features)
    assert attention.sum().item() == pytest.approx(1.0)
    order = torch.randperm(7)
    other_logits, other_attention = model(features[order])
    torch.testing.assert_close(logits, other_logits)
    torch.testing.assert_close(attention[order], other_attention)


@pytest.mark.parametrize(
    ("train", "validation", "told"),
    [
        ([0, 1, 2], [0, 1], "no places in the classes"),
        ([0, 0], [0, 1], "no training slide is of the classes"),
        ([0, 1], [1, 1], "fewer than two classes"),
        ([0, 1], [], "fewer than two classes"),
        ([], [0, 1], "no training slide"),
    ],
)
def test_slides_that_cannot_train_a_classifier_are_refused(train, validation, told):
    bags = [[(lambda: torch.zeros(1, 2), label) for label in labels] for labels in (train, validation)]
    with pytest.raises(ValueError, match=told):
        train_mil(*bags, ["a", "b"], MILSettings())


def test_features_of_another_width_and_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="features should be"):
        AttentionMIL(5, ["a", "b"], MILSettings())(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="features should be"):
        AttentionMIL(5, ["a", "b"], MILSettings())(torch.zeros(0, 5))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of an attention classifier"):
        AttentionMIL.load(tmp_path / "x.safetensors")


def test_the_map_of_attention_holds_ranks_and_nothing_off_the_tissue():
    ranks = attention_map([0.9, 0.05, 0.05], [[0, 0], [1, 2], [1, 0]], (2, 3))
    np.testing.assert_allclose(ranks, [[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    with pytest.raises(ValueError, match="finite values"):
        attention_map([np.nan], [[0, 0]], (1, 1))


def test_a_picture_of_glass_and_tissue_is_cut_at_its_tissue():
    picture = draw(2, 2, [(0, 0)], side=16)
    mask = slides.tissue_mask(picture)
    assert mask[:16, :16].mean() > 0.95
    assert mask[16:].mean() < 0.02
