"""Figures of articles as rows: from folders, tarballs and buckets; what is not wanted or not safe is dropped."""

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from medclip_hf.data.articles.bucket import BucketStore, RetryRules
from medclip_hf.data.articles.jats import UnreadableArticle
from medclip_hf.data.articles.pmc import ArticleSource, open_store
from medclip_hf.data.articles.stores import ArticleRef, Graphics
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

ARTICLES = Path(__file__).parent


def picture(colour="grey", file_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 80), colour).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two articles in the layout of the bucket, the first with pictures."""
    for number in (1, 2):
        place = tmp_path / f"PMC900000{number}.1"
        place.mkdir()
        shutil.copy(ARTICLES / f"PMC900000{number}.1.xml", place)
    first = tmp_path / "PMC9000001.1"
    for name in ("g001.jpg", "g002.jpg", "g006.jpg", "e001.jpg"):
        (first / f"drawn-9000001-{name}").write_bytes(picture())
    (first / "drawn-9000001-g004.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    return tmp_path


def read_all(source):
    outcomes = [outcome for item in source.list_items() for outcome in source.read(item)]
    rows = {outcome.row_id: outcome for outcome in outcomes if isinstance(outcome, FigureRow)}
    drops = {outcome.row_id: outcome.reason for outcome in outcomes if isinstance(outcome, Drop)}
    return rows, drops


def folder_source(folder, **options):
    return ArticleSource(open_store("folder", str(folder)), **options)


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_figure_becomes_a_row_with_all_that_the_article_says(folder):
    rows, _ = read_all(folder_source(folder))
    row = rows["PMC9000001.1/F2"]
    assert row.caption == "Ultrasound follow-up. After one week."
    assert (row.pmcid, row.pmid, row.figure_id, row.license) == ("PMC9000001", "39000001", "F2", "CC BY-NC")
    assert row.cited_in == ("2. Case report",)
    assert row.image_bytes == (folder / "PMC9000001.1" / "drawn-9000001-g002.jpg").read_bytes()


def test_figures_without_file_and_names_that_climb_out_are_dropped(folder):
    _, drops = read_all(folder_source(folder))
    assert drops["PMC9000001.1/F3"] == "image missing"
    assert drops["PMC9000001.1/F4-2"] == "image path outside its folder"


def test_a_picture_that_no_figure_names_is_dropped_but_not_those_of_formulae(folder):
    (folder / "PMC9000001.1" / "stray.png").write_bytes(picture())
    (folder / "PMC9000001.1" / "drawn-9000001-g002.gif").write_bytes(picture())  # a thumbnail
    _, drops = read_all(folder_source(folder))
    strays = [row_id for row_id, reason in drops.items() if reason == "file belongs to no figure"]
    assert strays == ["PMC9000001.1/stray.png"]


def test_a_figure_of_two_files_gives_two_marked_rows(folder):
    for name in ("hand", "two-a", "two-b"):
        (folder / "PMC9000002.1" / f"{name}.png").write_bytes(picture(file_format="PNG"))
    rows, drops = read_all(folder_source(folder, keep_retracted=True))
    assert [rows[f"PMC9000002.1/fig2.{number}"].is_compound for number in (1, 2)] == [True, True]
    assert drops["PMC9000002.1/nofile"] == "figure without file"


def test_a_compound_figure_of_an_article_is_taken_apart_on_request(folder):
    pixels = np.full((100, 210, 3), 255, np.uint8)
    pixels[:, :100], pixels[:, 110:] = (200, 0, 0), (0, 0, 200)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / "PMC9000001.1" / "drawn-9000001-g001.jpg").write_bytes(buffer.getvalue())
    rows, _ = read_all(folder_source(folder))
    assert rows["PMC9000001.1/F1.A"].caption.startswith("Chest CT at admission. Axial image")
    assert rows["PMC9000001.1/F1.B"].caption.startswith("Chest CT at admission. Coronal image")
    panel = np.asarray(Image.open(io.BytesIO(rows["PMC9000001.1/F1.B"].image_bytes)))
    assert (panel == (0, 0, 200)).all()
    whole, _ = read_all(folder_source(folder, split_panels=False))
    assert "PMC9000001.1/F1" in whole


def test_files_of_a_figure_carry_the_parts_of_its_caption(folder):
    path = folder / "PMC9000002.1" / "PMC9000002.1.xml"
    path.write_bytes(path.read_bytes().replace(b"Two pictures.", b"Two pictures. (A) A left hand. (B) A right hand."))
    for name in ("two-a", "two-b"):
        (folder / "PMC9000002.1" / f"{name}.png").write_bytes(picture(file_format="PNG"))
    rows, _ = read_all(folder_source(folder, keep_retracted=True))
    assert rows["PMC9000002.1/fig2.B"].caption == "Two pictures. A right hand."
    assert not rows["PMC9000002.1/fig2.B"].is_compound


# --- what is wanted -----------------------------------------------------------------------------------------------


def test_retracted_articles_are_dropped_unless_asked_for(folder):
    assert read_all(folder_source(folder))[1]["PMC9000002.1"] == "article retracted"
    assert "PMC9000002.1" not in read_all(folder_source(folder, keep_retracted=True))[1]


def test_only_the_licences_asked_for_are_kept(folder):
    rows, drops = read_all(folder_source(folder, licenses=("CC BY",)))
    assert not rows
    assert drops["PMC9000001.1"] == "licence not kept"


def test_a_figure_under_a_foreign_licence_is_dropped_alone(folder):
    rows, drops = read_all(folder_source(folder, licenses=("CC BY-NC",)))
    assert "PMC9000001.1/F2" in rows
    assert drops["PMC9000001.1/F4"] == "licence of the figure not kept"


def test_the_metadata_file_goes_before_the_xml(folder):
    metadata = {"license_code": "CC BY", "is_retracted": False, "pmid": 39000009}
    (folder / "PMC9000001.1" / "PMC9000001.1.json").write_text(json.dumps(metadata))
    rows, _ = read_all(folder_source(folder, licenses=("CC BY",)))
    assert rows["PMC9000001.1/F2"].license == "CC BY"


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"license_code": '])
def test_a_broken_metadata_file_drops_the_article(folder, content):
    (folder / "PMC9000001.1" / "PMC9000001.1.json").write_text(content)
    assert read_all(folder_source(folder))[1]["PMC9000001.1"] == "article metadata broken"


@pytest.mark.parametrize("value", [True, "true", 1])
def test_a_retraction_in_the_metadata_counts_however_it_is_written(folder, value):
    (folder / "PMC9000001.1" / "PMC9000001.1.json").write_text(json.dumps({"is_retracted": value}))
    assert read_all(folder_source(folder))[1]["PMC9000001.1"] == "article retracted"


def test_a_misspelled_licence_is_an_error(folder):
    with pytest.raises(ValueError, match="unknown licences 'cc-by': choose among CC0"):
        folder_source(folder, licenses=("cc-by",))


# --- folders --------------------------------------------------------------------------------------------------------


def test_supplementary_xml_beside_an_article_is_no_article(folder):
    (folder / "PMC9000001.1" / "supplement.xml").write_text("<table/>")
    assert len(list(folder_source(folder).list_items())) == 2


def test_articles_of_one_flat_folder_and_of_deep_ones_have_distinct_names(tmp_path):
    for place in ("", "00/a1", "00/a2"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(ARTICLES / "PMC9000001.1.xml", tmp_path / place / "article.nxml")
    names = [item["name"] for item in folder_source(tmp_path).list_items()]
    assert names == ["article", "00/a1/article", "00/a2/article"]


def test_pictures_of_other_articles_in_a_flat_folder_are_no_strays(tmp_path):
    shutil.copy(ARTICLES / "PMC9000001.1.xml", tmp_path / "first.xml")
    shutil.copy(ARTICLES / "PMC9000001.1.xml", tmp_path / "second.xml")
    (tmp_path / "of-a-third.jpg").write_bytes(picture())
    assert "file belongs to no figure" not in read_all(folder_source(tmp_path))[1].values()


def test_a_file_and_a_folder_of_one_name_are_two_articles(tmp_path):
    (tmp_path / "a").mkdir()
    for path in ("a.xml", "a/a.xml"):
        shutil.copy(ARTICLES / "PMC9000001.1.xml", tmp_path / path)
    assert [item["name"] for item in folder_source(tmp_path).list_items()] == ["a.xml", "a"]


def test_broken_articles_are_dropped_and_the_others_read(folder):
    (folder / "PMC9000002.1" / "PMC9000002.1.xml").write_bytes(b"<article>")
    (folder / "empty").mkdir()
    (folder / "empty" / "empty.xml").write_bytes(b"")
    rows, drops = read_all(folder_source(folder))
    assert drops["PMC9000002.1"] == "XML broken"
    assert drops["empty"] == "XML file empty"
    assert "PMC9000001.1/F2" in rows


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    outside.write_bytes(picture())
    link = folder / "PMC9000001.1" / "drawn-9000001-g003.jpg"
    link.symlink_to(outside)
    assert read_all(folder_source(folder))[1]["PMC9000001.1/F3"] == "image path outside its folder"


def test_a_pipe_in_the_place_of_a_picture_does_not_block(folder):
    os.mkfifo(folder / "PMC9000001.1" / "drawn-9000001-g003.jpg")
    assert read_all(folder_source(folder))[1]["PMC9000001.1/F3"] == "image missing"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        open_store("folder", str(tmp_path / "nowhere"))


def test_an_item_cannot_name_a_file_outside_the_folder(folder):
    ref = {"name": "x", "location": "../../etc/passwd", "pmcid": ""}
    assert [drop.reason for drop in folder_source(folder).read(ref)] == ["image path outside its folder"]


# --- names of pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("g1.jpg", ["g1.gif", "g1.jpg"], "g1.jpg"),
        ("g1", ["g1.gif", "g1.jpg"], "g1.jpg"),
        ("G1.JPG", ["g1.jpg"], "g1.jpg"),
        ("g1.tif", ["g1.jpg"], "g1.jpg"),
        ("g1.eps", ["g1.eps", "g1.png"], "g1.png"),
        ("g1.eps", ["g1.eps"], "g1.eps"),
        ("figures/g1.png", ["g1.png"], "g1.png"),
        ("10.1000.x-g1", ["10.1000.x-g1.jpg"], "10.1000.x-g1.jpg"),
    ],
)
def test_a_picture_is_found_under_the_names_that_articles_use(name, files, found):
    assert Graphics(files, str.encode)(name) == found.encode()


@pytest.mark.parametrize("name", ["../g1.jpg", "a/../../g1.jpg", "/etc/g1.jpg", "C:\\g1.jpg", "..\\g1.jpg"])
def test_a_name_that_leaves_the_article_is_refused(name):
    with pytest.raises(UnreadableImage) as caught:
        Graphics(["g1.jpg"], str.encode)(name)
    assert caught.value.reason == "image path outside its folder"


def test_references_survive_a_journey_through_json(folder):
    items = list(folder_source(folder).list_items())
    assert json.loads(json.dumps(items)) == items
    assert ArticleRef(**items[0]).pmcid == "PMC9000001"


# --- tarballs -------------------------------------------------------------------------------------------------------


def write_tarball(path, files, special=()):
    """A gzipped tarball of `files` (name -> bytes) and members that are no files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tarball:
        for member in special:
            tarball.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tarball.addfile(member, io.BytesIO(content))


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


ARTICLE = (ARTICLES / "PMC9000001.1.xml").read_bytes()


def tarball_source(folder):
    return ArticleSource(open_store("tarballs", str(folder)))


def test_a_tarball_is_read_without_being_unpacked(tmp_path):
    files = {"PMC9000001/a.nxml": ARTICLE, "PMC9000001/drawn-9000001-g002.jpg": picture(), "PMC9000001/s.xml": b"<x/>"}
    write_tarball(tmp_path / "00/ab/PMC9000001.tar.gz", files)
    rows, _ = read_all(tarball_source(tmp_path))
    assert rows["00/ab/PMC9000001/F2"].image_bytes == picture()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["PMC9000001.tar.gz"]


def test_links_and_devices_in_a_tarball_are_refused(tmp_path):
    members = [
        special("PMC1/drawn-9000001-g001.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("PMC1/drawn-9000001-g002.jpg", tarfile.CHRTYPE),
        special("PMC1/drawn-9000001-g003.jpg", tarfile.LNKTYPE, "PMC1/a.nxml"),
    ]
    write_tarball(tmp_path / "PMC1.tar.gz", {"PMC1/a.nxml": ARTICLE}, members)
    _, drops = read_all(tarball_source(tmp_path))
    assert {drops[f"PMC1/F{number}"] for number in (1, 2, 3)} == {"image is a link or a device"}


def test_members_that_climb_out_are_never_written(tmp_path):
    files = {"../../a.nxml": ARTICLE, "/abs/drawn-9000001-g002.jpg": picture()}
    write_tarball(tmp_path / "inner" / "PMC1.tar.gz", files)
    rows, _ = read_all(tarball_source(tmp_path / "inner"))
    assert "PMC1/F2" in rows
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["PMC1.tar.gz"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "tarball broken"),
        (b"no gzip at all", "tarball broken"),
        (b"\x1f\x8b\x08\0" + b"\0" * 20, "tarball broken"),
    ],
)
def test_a_broken_tarball_is_dropped(tmp_path, content, reason):
    (tmp_path / "PMC1.tar.gz").write_bytes(content)
    assert read_all(tarball_source(tmp_path))[1] == {"PMC1": "tarball broken"}


def test_a_cut_tarball_is_dropped(tmp_path):
    files = {"a.nxml": ARTICLE, "drawn-9000001-g002.jpg": os.urandom(50_000)}
    write_tarball(tmp_path / "PMC1.tar.gz", files)
    whole = (tmp_path / "PMC1.tar.gz").read_bytes()
    (tmp_path / "PMC1.tar.gz").write_bytes(whole[:20_000])
    assert read_all(tarball_source(tmp_path))[1] == {"PMC1": "tarball broken"}


def test_a_tarball_without_article_is_dropped(tmp_path):
    write_tarball(tmp_path / "PMC1.tar.gz", {"drawn.jpg": picture()})
    assert read_all(tarball_source(tmp_path))[1] == {"PMC1": "tarball without article"}


def test_a_tarball_that_grows_beyond_the_limit_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("medclip_hf.data.articles.tarballs.MAX_UNPACKED_BYTES", 2**20)
    write_tarball(tmp_path / "PMC1.tar.gz", {"a.nxml": ARTICLE, "zeros.bin": bytes(2**22)})
    assert (tmp_path / "PMC1.tar.gz").stat().st_size < 20_000
    assert read_all(tarball_source(tmp_path))[1] == {"PMC1": "tarball too large"}


# --- the bucket -----------------------------------------------------------------------------------------------------

PATIENCE = RetryRules(attempts=3, first_wait_s=0.001)


def write_bucket(root, article_files, metadata=None, day="2026-01-18T01-00Z"):
    """A copy of the bucket's layout: `article_files` maps ``PMC1.1`` to its files."""
    keys = []
    for name, files in article_files.items():
        (root / name).mkdir(parents=True)
        (root / "metadata").mkdir(exist_ok=True)
        for file, content in files.items():
            (root / name / file).write_bytes(content)
        urls = [f"s3://pmc-oa-opendata/{name}/{quote(file)}?md5={md5(content)}" for file, content in files.items()]
        values = {
            "pmcid": name.partition(".")[0],
            "pmid": 39000001,
            "license_code": "CC BY",
            "is_retracted": False,
            "xml_url": next(url for url in urls if ".xml?" in url),
            "media_urls": [url for url in urls if ".xml?" not in url],
        }
        (root / "metadata" / f"{name}.json").write_text(json.dumps(values | (metadata or {})))
        keys.append(f"metadata/{name}.json")
    write_inventory(root, keys, day)


def write_inventory(root, keys, day):
    place = root / "inventory-reports/pmc-oa-opendata/metadata"
    (place / day).mkdir(parents=True, exist_ok=True)
    (place / "data").mkdir(exist_ok=True)
    lines = "".join(f'"pmc-oa-opendata","{key}","2026-01-08T11:47:59.000Z","f25d9c"\n' for key in keys)
    (place / "data" / f"{day}.csv.gz").write_bytes(gzip.compress(lines.encode()))
    manifest = {"files": [{"key": f"inventory-reports/pmc-oa-opendata/metadata/data/{day}.csv.gz"}]}
    (place / day / "manifest.json").write_text(json.dumps(manifest))


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def bucket(root):
    return BucketStore(f"file://{root}", PATIENCE)


class FlakyFiles:
    """A file system that answers some requests with an error or half a body, and remembers all of them."""

    def __init__(self, files, failures):
        self.files, self.failures, self.requests = files, failures, []

    def ls(self, path, **options):
        return self.files.ls(path, **options)

    def cat_file(self, path, **options):
        self.requests.append(path.rpartition("/")[2])
        content = self.files.cat_file(path, **options)
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        return content[: len(content) // 2] if failure == "half" else content


@pytest.fixture
def small_bucket(tmp_path):
    files = {"PMC9000001.1.xml": ARTICLE, "drawn-9000001-g002.jpg": picture(), "table é.xlsx": b"table"}
    write_bucket(tmp_path, {"PMC9000001.1": files})
    return tmp_path


def test_the_inventory_lists_the_newest_version_of_each_article_by_number(tmp_path):
    keys = [f"metadata/PMC{name}.json" for name in ("20.1", "3.2", "3.10", "3.1", "100.1")]
    write_inventory(tmp_path, ["metadata/PMC1.1.json"], "2026-01-17T01-00Z")
    write_inventory(tmp_path, [*keys, "README.txt", "metadata/../PMC9.1.json"], "2026-01-18T01-00Z")
    assert [ref.name for ref in bucket(tmp_path).list_articles()] == ["PMC3.10", "PMC20.1", "PMC100.1"]


def test_an_article_of_the_bucket_becomes_rows(small_bucket):
    rows, drops = read_all(ArticleSource(bucket(small_bucket)))
    assert rows["PMC9000001.1/F2"].image_bytes == picture()
    assert rows["PMC9000001.1/F2"].license == "CC BY"
    assert drops["PMC9000001.1/F1"] == "image missing"


def test_of_an_article_that_is_not_wanted_only_the_metadata_are_fetched(small_bucket):
    store = bucket(small_bucket)
    store.files = FlakyFiles(store.files, [])
    source = ArticleSource(store, licenses=("CC0",))
    drops = list(source.read({"name": "PMC9000001.1", "location": "PMC9000001.1"}))
    assert [drop.reason for drop in drops] == ["licence not kept"]
    assert store.files.requests == ["PMC9000001.1.json"]


@pytest.mark.parametrize("failure", [OSError("SlowDown: please reduce your request rate"), TimeoutError(), "half"])
def test_throttling_and_half_read_bodies_are_tried_again(small_bucket, failure):
    store = bucket(small_bucket)
    store.files = FlakyFiles(store.files, [failure, None, failure, None, failure, None])
    rows = list(ArticleSource(store).read({"name": "PMC9000001.1", "location": "PMC9000001.1"}))
    assert [row.image_bytes for row in rows if isinstance(row, FigureRow)] == [picture()]


def test_what_fails_every_time_is_dropped_with_the_reason(small_bucket):
    store = bucket(small_bucket)
    store.files = FlakyFiles(store.files, [OSError("SlowDown")] * 50)
    drops = list(ArticleSource(store).read({"name": "PMC9000001.1", "location": "PMC9000001.1"}))
    assert [drop.reason for drop in drops] == ["article not fetched"]
    assert "3 attempts failed, the last with OSError('SlowDown')" in drops[0].detail


def test_a_picture_that_differs_from_its_digest_is_dropped(small_bucket):
    (small_bucket / "PMC9000001.1" / "drawn-9000001-g002.jpg").write_bytes(b"another")
    assert read_all(ArticleSource(bucket(small_bucket)))[1]["PMC9000001.1/F2"] == "image not fetched"


def test_a_missing_object_is_not_asked_for_twice(small_bucket):
    (small_bucket / "PMC9000001.1" / "PMC9000001.1.xml").unlink()
    store = bucket(small_bucket)
    store.files = FlakyFiles(store.files, [])
    drops = list(ArticleSource(store).read({"name": "PMC9000001.1", "location": "PMC9000001.1"}))
    assert [drop.reason for drop in drops] == ["article missing"]
    assert store.files.requests == ["PMC9000001.1.json", "PMC9000001.1.xml"]


def test_media_of_another_folder_are_not_fetched(tmp_path):
    urls = ["s3://pmc-oa-opendata/PMC5.1/drawn-9000001-g002.jpg", "s3://x/PMC9000001.1/..%2F..%2Fsecret.jpg"]
    write_bucket(tmp_path, {"PMC9000001.1": {"PMC9000001.1.xml": ARTICLE}}, {"media_urls": urls})
    assert bucket(tmp_path).read_article(ArticleRef("PMC9000001.1", "PMC9000001.1")).open_graphic.names == ()


@pytest.mark.parametrize("urls", [5, ["http://[bad/PMC9000001.1/a.jpg"]])
def test_metadata_of_another_shape_drop_the_article(tmp_path, urls):
    write_bucket(tmp_path, {"PMC9000001.1": {"PMC9000001.1.xml": ARTICLE}}, {"media_urls": urls})
    with pytest.raises(UnreadableArticle, match="article metadata broken"):
        bucket(tmp_path).read_article(ArticleRef("PMC9000001.1", "PMC9000001.1"))


def test_a_bucket_without_inventory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no inventory below inventory-reports"):
        list(bucket(tmp_path).list_articles())


def test_a_cut_inventory_is_an_error_not_a_short_list(tmp_path):
    write_inventory(tmp_path, [f"metadata/PMC{number}.1.json" for number in range(5000)], "2026-01-18T01-00Z")
    path = next(tmp_path.rglob("*.csv.gz"))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cannot be read"):
        list(bucket(tmp_path).list_articles())


def test_a_protocol_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match="pip install s3fs"):
        open_store("s3", "s3://pmc-oa-opendata")
