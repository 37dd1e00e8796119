"""Fingerprints of images and the search for duplicates."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.engine.dedup import (
    FINGERPRINT,
    DuplicateRules,
    alike_pairs,
    find_duplicates,
    fingerprint,
    hamming,
    join_fingerprints,
    save_fingerprints,
)

RULES = DuplicateRules()


def picture(seed, size=(160, 120)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def prints(*named_files):
    records = [fingerprint(name, content, Image.open(io.BytesIO(content))) for name, content in named_files]
    return np.array(records, FINGERPRINT)


def random_prints(count, seed=0):
    rng = np.random.default_rng(seed)
    found = np.zeros(count, FINGERPRINT)
    for name in ("row_id", "content", "phash", "dhash"):
        found[name] = rng.integers(0, 2**64, found[name].shape, dtype=np.uint64)
    return found


def test_the_same_file_is_a_duplicate_of_the_first():
    a, b = encoded(picture(1)), encoded(picture(2))
    found = find_duplicates(prints(("x", a), ("y", b), ("z", a)), RULES)
    assert (found.rows.tolist(), found.originals.tolist(), found.reasons.tolist()) == ([2], [0], [1])


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encoded(image, quality=40),
        lambda image: encoded(image.resize((80, 60))),
        lambda image: encoded(image, "PNG"),
        lambda image: encoded(image.point(lambda value: min(255, int(value * 1.1)))),
    ],
    ids=["recompressed", "halved", "other format", "brighter"],
)
def test_a_changed_copy_is_nearly_the_same(change):
    image = picture(3)
    found = find_duplicates(prints(("x", encoded(image)), ("y", change(image))), RULES)
    assert (found.rows.tolist(), found.reasons.tolist()) == ([1], [2])


def test_different_pictures_stay():
    files = [(str(seed), encoded(picture(seed))) for seed in range(40)]
    assert len(find_duplicates(prints(*files), RULES).rows) == 0


def test_flat_pictures_are_not_taken_for_each_other():
    grey, white = (encoded(Image.new("RGB", (64, 64), colour), "PNG") for colour in ("grey", "white"))
    assert len(find_duplicates(prints(("x", grey), ("y", white)), RULES).rows) == 0


def test_a_repeated_row_id_goes_even_with_another_picture():
    found = find_duplicates(prints(("x", encoded(picture(1))), ("x", encoded(picture(2)))), RULES)
    assert (found.rows.tolist(), found.reasons.tolist()) == ([1], [0])


def test_the_copy_of_a_row_with_a_repeated_id_is_kept():
    first, second = encoded(picture(1)), encoded(picture(2))
    found = find_duplicates(prints(("x", first), ("x", second), ("y", second)), RULES)
    assert found.rows.tolist() == [1]


def test_in_a_chain_of_gradual_changes_the_far_end_stays():
    found = random_prints(3)
    found["dhash"] = found["dhash"][0]
    found["phash"] = [0, 0b1111, 0b11111111]  # each four bits from the one before
    result = find_duplicates(found, RULES)
    assert (result.rows.tolist(), result.originals.tolist()) == ([1], [0])


def test_hashes_that_differ_on_the_fine_grid_are_different_pictures():
    found = random_prints(2)
    found["phash"] = 7
    assert len(find_duplicates(found, RULES).rows) == 0


@pytest.mark.parametrize("distance", range(9))
def test_the_search_finds_what_comparing_all_with_all_finds(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 150, dtype=np.uint64)
    for number in range(1, 60):  # near ones, at 1 to 10 bits
        flips = rng.choice(64, rng.integers(1, 11), replace=False)
        hashes[number] = hashes[0] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    i, j = np.triu_indices(len(hashes), 1)
    expected = hamming(hashes[i], hashes[j]) <= distance
    found = {
        (int(a), int(b))
        for first, second in alike_pairs(hashes, distance, 1000)
        for a, b in zip(first, second, strict=True)
    }
    assert found == {(int(a), int(b)) for a, b in zip(i[expected], j[expected], strict=True)}


def test_parts_that_fit_into_memory_change_nothing():
    found = random_prints(5000)
    rng = np.random.default_rng(1)
    copies = rng.choice(5000, 600, replace=False)
    found["phash"][copies[:300]] = found["phash"][copies[300:]] ^ np.uint64(0b101)
    found["dhash"][copies[:300]] = found["dhash"][copies[300:]]
    whole = find_duplicates(found, RULES)
    parts = find_duplicates(found, DuplicateRules(max_rows_in_memory=1000))
    assert len(whole.rows) == 300
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        assert np.array_equal(one, other)


def test_an_empty_set_has_no_duplicates():
    assert len(find_duplicates(np.zeros(0, FINGERPRINT), RULES).rows) == 0


def test_fingerprints_survive_the_disk(tmp_path):
    found = random_prints(7)
    save_fingerprints(tmp_path / "a.npy", list(found[:3]))
    save_fingerprints(tmp_path / "b.npy", [])
    save_fingerprints(tmp_path / "c.npy", list(found[3:]))
    joined = join_fingerprints([tmp_path / f"{name}.npy" for name in "abc"], tmp_path / "all.npy")
    assert np.array_equal(joined, found)


@pytest.mark.parametrize("distance", [-1, 9])
def test_a_distance_that_the_search_cannot_do_is_refused(distance):
    with pytest.raises(ValueError, match="max_phash_distance must lie in 0 to 8"):
        DuplicateRules(max_phash_distance=distance)


def test_re_encoded_real_figures_are_found_and_others_are_not(real_data):
    files = [path.read_bytes() for path in sorted((real_data / "pmc_sample" / "images").iterdir())[:30]]
    copies = [encoded(Image.open(io.BytesIO(content)).convert("RGB"), quality=50) for content in files]
    named = [(f"row {number}", content) for number, content in enumerate(files + copies)]
    found = find_duplicates(prints(*named), RULES)
    assert found.rows.tolist() == list(range(30, 60))
    assert found.originals.tolist() == list(range(30))
