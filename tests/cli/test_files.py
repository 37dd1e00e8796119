"""Which files a command finds, and how it notes those that cannot be used."""

import os
from pathlib import Path

import pytest

from medclip_hf.cli.files import SetAside, named_paths, pictures, scan_name, scans

DICOM = bytes(128) + b"DICM"


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_of_slices_is_one_scan_and_other_folders_are_searched(tmp_path):
    write(tmp_path / "patient" / "series" / "IM0001", DICOM)
    write(tmp_path / "patient" / "series" / "IM0002", DICOM)
    write(tmp_path / "patient" / "report.txt")
    write(tmp_path / "one.nii.gz")
    write(tmp_path / ".hidden.nii.gz")
    assert list(scans([tmp_path])) == [tmp_path / "one.nii.gz", tmp_path / "patient" / "series"]


def test_pictures_are_known_by_their_ending_or_the_dicom_mark(tmp_path):
    found = [write(tmp_path / "IM1", DICOM), write(tmp_path / "a.PNG"), write(tmp_path / "deep" / "b.jpeg")]
    write(tmp_path / "notes.txt")
    write(tmp_path / "README")
    assert list(pictures([tmp_path])) == found
    assert list(pictures([tmp_path / "notes.txt"])) == [tmp_path / "notes.txt"]  # named: tried


def test_links_to_nowhere_are_found_to_be_set_aside_and_pipes_are_not_waited_for(tmp_path):
    (tmp_path / "lost.png").symlink_to(tmp_path / "absent.png")
    os.mkfifo(tmp_path / "pipe")
    assert list(pictures([tmp_path])) == [tmp_path / "lost.png"]


def test_a_link_back_lists_no_scan_again_and_a_linked_folder_is_searched(tmp_path):
    for folder in ("here/inner", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "a.nii.gz").touch()
    (tmp_path / "elsewhere" / "b.nii.gz").touch()
    (tmp_path / "here" / "inner" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "other").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in scans([tmp_path / "here"])] == ["a.nii.gz", "b.nii.gz"]


def test_a_folder_without_what_is_looked_for_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        list(pictures([tmp_path]))
    with pytest.raises(ValueError, match="holds no scan"):
        list(scans([tmp_path]))
    with pytest.raises(ValueError, match="there is no file"):
        named_paths([])


def test_a_scan_is_named_without_its_ending():
    names = {"a.nii.gz": "a", "b.NII": "b", "c.npz": "c", "series.1": "series.1"}
    assert {name: scan_name(Path(name)) for name in names} == names


def test_what_cannot_be_read_is_noted_and_the_rest_goes_on(tmp_path, capsys):
    def read(path):
        if path.name == "bad":
            raise ValueError("it is\ndamaged")
        return path.name

    aside = SetAside()
    assert list(aside.reading([Path("bad"), Path("good")], read)) == [(Path("good"), "good")]
    assert aside.reasons == [("bad", "it is damaged")]
    assert capsys.readouterr().err == "set aside: bad: it is damaged\n"
    aside.write(tmp_path / "aside.csv")
    assert (tmp_path / "aside.csv").read_text() == "file,reason\nbad,it is damaged\n"
    SetAside().write(tmp_path / "aside.csv")
    assert not (tmp_path / "aside.csv").exists()
