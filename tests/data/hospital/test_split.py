"""Splits by patient, alike in their labels, decided by the key; duplicates across them; the key itself."""

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.engine.dedup import fingerprint
from medclip_hf.data.hospital.duplicates import pairs_across_splits
from medclip_hf.data.hospital.pseudonyms import KEY_BYTES, Pseudonyms, normal_identifier, read_or_create_key
from medclip_hf.data.hospital.split import SplitShares, split_of_patients, stratified_split
from medclip_hf.data.hospital.table import TableRow

KEY = Pseudonyms(b"k" * KEY_BYTES)


def test_labels_are_dealt_out_by_share_even_where_they_are_rare():
    labels = {f"{i:03d}": [(("common", i % 2 == 0), ("rare", i < 20))] for i in range(200)}
    found = stratified_split(labels, SplitShares())
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        own = [patient for patient, name in found.items() if name == split]
        assert len(own) == pytest.approx(200 * share, abs=3)
        assert sum(int(patient) < 20 for patient in own) == pytest.approx(20 * share, abs=1)
        assert sum(int(patient) % 2 == 0 for patient in own) == pytest.approx(100 * share, abs=3)


def test_the_order_of_the_table_changes_nothing():
    labels = {f"{i}": [(("a", i % 3 == 0),)] for i in range(50)}
    assert stratified_split(labels, SplitShares()) == stratified_split(dict(reversed(labels.items())), SplitShares())


def test_every_split_gets_a_patient_and_too_few_are_refused():
    assert set(stratified_split({"a": [()], "b": [()], "c": [()]}, SplitShares()).values()) == {
        "train",
        "validation",
        "test",
    }
    with pytest.raises(ValueError, match="cannot fill"):
        stratified_split({"a": [()], "b": [()]}, SplitShares())


def test_a_patient_typed_in_two_ways_is_one_patient():
    rows = [TableRow(i, f"{i}", patient) for i, patient in enumerate(["0012", " 12", "１２", "a B", "AB", "13", "14"])]
    assert len(split_of_patients(rows, SplitShares(), KEY)) == 4


def test_a_patient_in_two_splits_of_the_table_is_refused_by_row_numbers():
    rows = [TableRow(2, "a", "Zeb", split="train"), TableRow(3, "b", "zeb ", split="test")]
    with pytest.raises(ValueError, match="1 patients stand in two splits \\(rows 2, 3\\)") as error:
        split_of_patients(rows, SplitShares(), KEY)
    assert "eb" not in str(error.value).replace("be ", "")


def test_equal_and_nearly_equal_pictures_across_splits_are_found():
    y, x = np.mgrid[:64, :64] / 64
    one = Image.fromarray((127 + 100 * np.sin(9 * x + 4 * y)).astype(np.uint8))
    near = Image.fromarray(np.asarray(one) + np.uint8(2))
    other = Image.fromarray((127 + 100 * np.cos(17 * x * y)).astype(np.uint8))
    images = {"a": one, "b": near, "c": other, "d": one}
    prints = [fingerprint(name, name.encode(), image) for name, image in images.items()]
    pairs = pairs_across_splits(prints, list(images), ["train", "test", "test", "train"], ["p", "q", "q", "q"])
    assert {(pair.first, pair.second, pair.same_patient) for pair in pairs} == {("b", "a", False), ("b", "d", True)}


def test_the_key_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "sub" / "key"
    made = read_or_create_key(path, tmp_path / "out")
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_or_create_key(path).patient("7") == made.patient("007") != Pseudonyms(b"x" * KEY_BYTES).patient("7")
    assert made.key.hex() not in repr(made)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_or_create_key(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ValueError, match="is no key"):
        read_or_create_key(path)
    with pytest.raises(ValueError, match="lies inside"):
        read_or_create_key(tmp_path / "out" / "key", tmp_path / "out")


def test_domains_and_parts_are_kept_apart():
    assert KEY.of("a", "bc") != KEY.of("ab", "c") != KEY.of("a", "b", "c")
    assert normal_identifier("0") == "0"
