"""What becomes of pictures and scans does not depend on batches, workers, processes or restarts."""

import io
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.parquet import write_figure_rows
from medclip_hf.data.records import FigureRow
from medclip_hf.data.workers import Task
from medclip_hf.evaluation import scan_embedding_run
from medclip_hf.evaluation.ct_zero_shot import embed_scan
from medclip_hf.evaluation.embedding_run import PictureStep, RunOptions
from medclip_hf.evaluation.embedding_sources import FigureShards, PictureFolder
from medclip_hf.evaluation.embedding_store import EmbeddingStore, read_shards
from medclip_hf.evaluation.encoders import Encoder, ImageEmbeddings
from medclip_hf.evaluation.scan_embedding_run import ScanStep
from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.processing.conceptclip.processing_conceptclip import to_rgb

SIDE = 4


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoder(has_patches=True):
    torch.manual_seed(0)
    weight = torch.randn(3 * SIDE * SIDE, 6)

    def preprocess(image):
        return torch.from_numpy(np.array(to_rgb(image).resize((SIDE, SIDE)))).permute(2, 0, 1) / 255

    def forward(pixels):
        pooled = pixels.flatten(1) @ weight
        patches = F.normalize(pixels.flatten(2).transpose(1, 2), dim=-1) if has_patches else None
        return ImageEmbeddings(F.normalize(pooled, dim=-1), pooled.norm(dim=-1), patches)

    return Encoder(
        name="linear",
        identity="linear",
        device=torch.device("cpu"),
        dtype=torch.float32,
        logit_scale=1.0,
        logit_bias=0.0,
        concept_logit_scale=1.0 if has_patches else None,
        concept_logit_bias=0.0,
        num_patches=SIDE * SIDE if has_patches else 0,
        preprocess=preprocess,
        forward_pixels=forward,
        forward_texts=lambda texts: torch.zeros(len(texts), 6),
    )


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures, of which the first of a subfolder and the last two cannot be used; names in any language."""
    folder = tmp_path / "pictures"
    for number in range(10):
        path = folder / ("röntgen" if number % 2 else "ct") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    (folder / "ct" / "0.png").write_bytes(b"no picture")
    (folder / "röntgen" / "7.png").write_bytes(png(7)[:60])
    (folder / "röntgen" / "9.png").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(png(1))
    (folder / "notes.txt").write_text("nothing")
    return PictureFolder(folder)


def step_in(folder, source, rows_per_shard=4, with_patches=False, **options):
    how = RunOptions(with_patches=with_patches, **options)
    store = EmbeddingStore(folder, {}, num_rows=len(source), rows_per_shard=rows_per_shard, store_format="parquet")
    store.open()
    return PictureStep(encoder(), source, store, how)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tasks_of(step, rank=0, world_size=1):
    return [Task(unit) for unit in range(rank, step.store.num_units, world_size) if not step.store.is_done(unit)]


def test_rows_are_those_of_the_encoder_and_bad_pictures_have_reasons(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures, batch_size=3, with_patches=True)
    reports = list(step.stream(tasks_of(step)))
    assert [report.num_items for report in reports] == [4, 4, 2]
    total = step.store.finish()
    assert (total.kept, sum(total.dropped.values())) == (7, 3)
    assert {"image not recognised", "image damaged", "image file empty"} == set(total.dropped)
    shards = list(read_shards(tmp_path / "out"))
    row_ids = [row_id for shard in shards for row_id in shard.row_ids]
    assert row_ids == [
        "ct/2.png",
        "ct/4.png",
        "ct/6.png",
        "ct/8.png",
        "röntgen/1.png",
        "röntgen/3.png",
        "röntgen/5.png",
    ]
    expected = encoder().encode_images([tmp_path / "pictures" / row_id for row_id in row_ids])
    for name in ("image_embeds", "image_norms", "patch_embeds"):
        found = np.concatenate([shard.arrays[name] for shard in shards])
        np.testing.assert_allclose(found, getattr(expected, name), atol=1e-6)


def test_files_are_the_same_for_any_workers_processes_and_after_a_kill(tmp_path, pictures):
    alone = step_in(tmp_path / "alone", pictures, batch_size=3)
    list(alone.stream(tasks_of(alone)))
    alone.store.finish()

    shared = step_in(tmp_path / "shared", pictures, batch_size=3, num_workers=2)
    killed = shared.stream(tasks_of(shared, rank=1, world_size=2))
    next(killed)  # unit 1 of processes 0 and 1, then both are gone
    del killed
    for rank in (2, 0, 1):  # now they are three
        again = step_in(tmp_path / "shared", pictures, batch_size=3)
        list(again.stream(tasks_of(again, rank, 3)))
        done = again.store.finish()
    assert done is not None
    assert bytes_of(tmp_path / "shared") == bytes_of(tmp_path / "alone")


def test_a_unit_without_one_good_picture_is_finished(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"bad")
    step = step_in(tmp_path / "out", PictureFolder(folder), rows_per_shard=2)
    list(step.stream(tasks_of(step)))
    assert step.store.finish().as_dict() == {"kept": 0, "dropped": {"image not recognised": 3}}
    assert list(read_shards(tmp_path / "out")) == []


def test_a_unit_that_kills_its_process_can_be_set_aside(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures)
    assert step.set_aside(Task(2), "worker process killed").tally.dropped["worker process killed"] == 2
    assert step.store.is_done(2)


def test_a_picture_that_kills_its_loader_worker_is_set_aside_alone(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures, rows_per_shard=10, batch_size=3, num_workers=2)
    whole = step.encoder.preprocess

    def preprocess(image):
        if to_rgb(image).getpixel((0, 0)) == Image.open(io.BytesIO(png(6))).getpixel((0, 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(image)

    def forward(pixels):
        time.sleep(0.1)  # so that the death comes while the tower computes
        return encoder().forward_pixels(pixels)

    step.encoder = replace(step.encoder, preprocess=preprocess, forward_pixels=forward)
    list(step.stream(tasks_of(step)))
    total = step.store.finish()
    assert (total.kept, total.dropped["picture killed its loader worker"]) == (6, 1)
    (shard,) = read_shards(tmp_path / "out")
    assert "ct/6.png" not in shard.row_ids
    expected = encoder().encode_images([pictures.folder / row_id for row_id in shard.row_ids])
    np.testing.assert_allclose(shard.arrays["image_embeds"], expected.image_embeds, atol=1e-6)


def test_values_that_are_not_finite_end_the_run_and_are_never_written(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures)
    broken = encoder()
    step.encoder = Encoder(
        **{**vars(broken), "forward_pixels": lambda pixels: ImageEmbeddings(*[pixels.flatten(1) / 0] * 2)}
    )
    with pytest.raises(ValueError, match="not finite in float32"):
        list(step.stream(tasks_of(step)))
    assert not step.store.is_done(0)


def test_a_value_that_overflows_where_it_is_stored_ends_the_run(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures, rows_per_shard=10, batch_size=5, stored_type="float16")
    largest = [65519.0, 65520.0]  # float16 rounds the first to its largest number, the second to infinity

    def forward(pixels):
        return ImageEmbeddings(*[torch.full((len(pixels), 6), largest.pop(0))] * 2)

    step.encoder = replace(step.encoder, forward_pixels=forward)
    with pytest.raises(ValueError, match="image_embeds of linear are not finite in float16"):
        list(step.stream(tasks_of(step)))
    assert largest == []
    assert not step.store.is_done(0)


def test_a_shard_is_written_while_the_next_is_computed_and_none_is_left_half_written(tmp_path, pictures):
    step = step_in(tmp_path / "out", pictures, rows_per_shard=3, batch_size=3)
    whole, order, slow = step.store.write, [], threading.Event()

    def write(unit, shard, drops):
        if unit == 0:
            assert slow.wait(20)  # for the tower to come to the next unit
        order.append(f"written {unit}")
        return whole(unit, shard, drops)

    def forward(pixels):
        order.append("tower")
        if len([name for name in order if name == "tower"]) == 3:
            slow.set()
        return encoder().forward_pixels(pixels)

    step.store.write = write
    step.encoder = replace(step.encoder, forward_pixels=forward)
    reports = step.stream(tasks_of(step))
    assert next(reports).task == Task(0)
    reports.close()  # amid the next shard
    assert order[:4] == ["tower", "tower", "tower", "written 0"]
    assert {path.name for path in (tmp_path / "out").glob("embeddings-*")} >= {"embeddings-00000.parquet"}
    assert not list((tmp_path / "out").glob(".embeddings-*"))
    again = step_in(tmp_path / "out", pictures, rows_per_shard=3, batch_size=3)
    list(again.stream(tasks_of(again)))
    assert again.store.finish().kept == 7


def test_settings_out_of_range_and_patches_of_a_model_without_are_refused(tmp_path, pictures):
    for wrong in ({"batch_size": 0}, {"num_workers": -1}, {"stored_type": "bfloat16"}):
        with pytest.raises(ValueError, match="|".join(wrong)):
            RunOptions(**wrong)
    store = EmbeddingStore(tmp_path, {}, num_rows=10, rows_per_shard=4, store_format="parquet")
    with pytest.raises(ValueError, match="no patch heads"):
        PictureStep(encoder(has_patches=False), pictures, store, RunOptions(with_patches=True))


# Sources ---------------------------------------------------------------------------------------------------------


def test_figure_shards_give_every_row_in_order_and_set_damaged_groups_aside(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").write_bytes(png(1))
    rows = [
        FigureRow("a", "caption", image_bytes=png(0)),
        FigureRow("b", "caption", image_path="images/b.png"),
        FigureRow("c", "caption", image_path="../outside.png"),
        FigureRow("d", "caption", image_bytes=png(3)),
    ]
    write_figure_rows(rows, tmp_path, "train", rows_per_shard=3)
    source = FigureShards(tmp_path, "train")
    assert [source.row_id(index) for index in range(len(source))] == ["a", "b", "c", "d"]
    assert [source.read(index) for index in (3, 0, 1)] == [png(3), png(0), png(1)]
    with pytest.raises(UnreadableImage, match="outside"):
        source.read(2)
    shard = sorted(tmp_path.glob("train-*.parquet"))[1]
    footer = shard.read_bytes()
    shard.write_bytes(b"\0" * 400 + footer[400:])
    step = step_in(tmp_path / "out", FigureShards(tmp_path, "train"))
    list(step.stream(tasks_of(step)))
    total = step.store.finish()
    assert total.kept == 2
    assert total.dropped["row group damaged"] == 1


def test_sources_without_a_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        PictureFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no picture"):
        PictureFolder(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "train-00000.parquet")
    with pytest.raises(ValueError, match="lacks the columns"):
        FigureShards(tmp_path, "train")


def test_another_list_of_pictures_is_another_source(tmp_path, pictures):
    before = pictures.identity
    (pictures.folder / "ct" / "new.png").write_bytes(png(1))
    assert PictureFolder(pictures.folder).identity != before


def test_pictures_are_listed_in_the_order_of_their_paths(tmp_path):
    names = [
        "a.png",
        "a-b/x.PNG",
        "a/b.png",
        "a/b-c.jpg",
        "a/b/c.png",
        "ab.png",
        ".hidden.png",
        "a/notes.txt",
        ".d/e.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "z.png").symlink_to(tmp_path / "gone.png")
    source = PictureFolder(tmp_path)
    expected = sorted([*names[:6], "z.png"])
    assert [source.row_id(index) for index in range(len(source))] == expected
    assert [source.read(index).decode() for index in range(6)] == expected[:6]


# Scans -----------------------------------------------------------------------------------------------------------


class DrawnScans:
    """Scans of several sizes; the third has no anatomy and the fourth cannot be read."""

    shapes = ((8, 8, 16), (6, 12, 8), (8, 8, 8), (8, 8, 8), (8, 8, 16), (9, 13, 17))

    def __len__(self):
        return len(self.shapes)

    def row_id(self, index):
        return f"scan {index}"

    def read(self, index):
        if index == 3:
            raise ValueError("its file is damaged")
        generator = torch.Generator().manual_seed(index)
        volume = torch.rand(self.shapes[index], generator=generator)
        mask = torch.zeros(self.shapes[index], dtype=torch.uint8)
        if index != 2:
            mask[0, 0, 0] = 1
            mask[4:, 5:, 2:] = 3
        return volume, mask


def fvlm():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size_dhw": (4, 8, 8), "patch_size_dhw": (2, 4, 4), "initializer_range": 0.5}
    config = FVLMConfig(
        vision_config=vision, text_config=small | {"vocab_size": 50}, feature_layers=(0,), pooling_num_attention_heads=2
    )
    return FVLMModel(config).eval()


@pytest.mark.parametrize(("num_workers", "max_waiting"), [(0, 32), (2, 32), (0, 1)])
def test_scans_in_common_batches_are_embedded_as_each_alone(tmp_path, num_workers, max_waiting, monkeypatch):
    monkeypatch.setattr(scan_embedding_run, "MAX_WAITING_WINDOWS", max_waiting)
    source, model = DrawnScans(), fvlm()
    store = EmbeddingStore(tmp_path, {}, num_rows=len(source), rows_per_shard=5, store_format="safetensors")
    store.open()
    step = ScanStep(model, source, store, RunOptions(2, num_workers), window_size_dhw=(4, 8, 8))
    list(step.stream([Task(0), Task(1)]))
    assert store.finish().as_dict() == {
        "kept": 4,
        "dropped": {"no anatomy of the model in the scan": 1, "scan cannot be used": 1},
    }
    seen = 0
    for shard in read_shards(tmp_path):
        for place, row_id in enumerate(shard.row_ids):
            expected = embed_scan(model, *source.read(int(row_id[5:])), window_size_dhw=(4, 8, 8))
            is_present = ~expected.isnan().any(-1)
            assert shard.arrays["anatomy_present"][place].astype(bool).tolist() == is_present.tolist()
            np.testing.assert_allclose(shard.arrays["anatomy_embeds"][place], expected.nan_to_num(), atol=1e-6)
            seen += 1
    assert seen == 4


class KillingScans(DrawnScans):
    """The same, but the fifth takes down whoever reads it."""

    def read(self, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_scan_that_kills_its_loader_worker_is_set_aside_alone(tmp_path):
    source = KillingScans()
    store = EmbeddingStore(tmp_path, {}, num_rows=len(source), rows_per_shard=4, store_format="parquet")
    store.open()
    step = ScanStep(fvlm(), source, store, RunOptions(2, num_workers=1), window_size_dhw=(4, 8, 8))
    list(step.stream([Task(0), Task(1)]))
    assert store.finish().as_dict() == {
        "kept": 3,
        "dropped": {
            "no anatomy of the model in the scan": 1,
            "scan cannot be used": 1,
            "scan killed its loader worker": 1,
        },
    }
    assert [row_id for shard in read_shards(tmp_path) for row_id in shard.row_ids] == ["scan 0", "scan 1", "scan 5"]
