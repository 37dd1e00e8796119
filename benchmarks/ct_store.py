"""How a CT scan is best kept for random crops: bytes on disk and milliseconds per crop of several formats.

    OMP_NUM_THREADS=1 python benchmarks/ct_store.py

Every candidate keeps the same image (int16 HU) and anatomy mask (uint8) and gives the same random (112, 256, 352) crop
of both, files opened anew each time as a data loader over many scans does; the crops are compared with the arrays.
Candidates take turns, one thread each, files in the page cache. The gzipped NIfTI is the reference.

The scan is the real torso of the shared data (3 mm) brought to 3 x 1 x 1 mm with noise of the grain of a soft kernel,
since interpolation alone would leave it too smooth to be hard to compress; without that data, a drawn torso.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medclip_hf.data.ct.anatomy import labelled_anatomies, merge_labels
from medclip_hf.data.ct.geometry import stored_hounsfield
from medclip_hf.data.ct.reading import load_ct
from medclip_hf.data.ct.volumes import read_crop, write_scan

Arrays = dict[str, NDArray]
Box = tuple[slice, slice, slice]
CROP_DHW = (112, 256, 352)


@dataclass(frozen=True)
class Candidate:
    """A way to keep a scan: `write(folder, arrays)`, then `read(folder, box)` gives the crop of each array."""

    name: str
    write: Callable[[Path, Arrays], None]
    read: Callable[[Path, Box], list[NDArray]]


def torso_arrays(noise_hu: float) -> Arrays:
    """Image and mask of a torso at 3 x 1 x 1 mm."""
    anatomies = labelled_anatomies("v2")
    shared = Path(os.environ.get("MEDCLIP_HF_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "ct"
    if (shared / "example_ct.nii.gz").is_file():
        scan = load_ct(
            shared / "example_ct.nii.gz",
            labels_path=shared / "example_seg_fast_force_split.nii.gz",
            anatomies=anatomies,
        )
        image, mask = scan.image.values, scan.anatomy_mask.values
    else:
        from medclip_hf.data.phantoms.torsos import TorsoSettings, draw_torso, plan_patient

        settings = TorsoSettings(in_plane_size=368, slice_spacing_mm=(3.0, 3.0), noise_hu=(0.0, 0.0))
        torso = draw_torso(plan_patient(0, 0, settings)[0], settings)
        image, mask = torso.image_hu, merge_labels(torso.labels, "v2", anatomies)
    grain = np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
    grain = ndimage.gaussian_filter(grain, (0, 0.6, 0.6))
    return {"image": stored_hounsfield(image + grain * (noise_hu / grain.std())), "anatomy_mask": mask}


def write_nifti(folder: Path, arrays: Arrays) -> None:
    """One .nii.gz an array, as nibabel writes it."""
    import nibabel

    for name, values in arrays.items():
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.eye(4)), folder / f"{name}.nii.gz")


def read_nifti(folder: Path, box: Box) -> list[NDArray]:
    """Nothing short of decompressing all of it."""
    import nibabel

    return [
        np.ascontiguousarray(np.asanyarray(nibabel.load(folder / f"{name}.nii.gz").dataobj).transpose(2, 1, 0)[box])
        for name in ("image", "anatomy_mask")
    ]


def write_raw(folder: Path, arrays: Arrays) -> None:
    """Uncompressed .npy files."""
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def read_raw(folder: Path, box: Box) -> list[NDArray]:
    """Through a memory map."""
    return [np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[box]) for name in ("image", "anatomy_mask")]


def write_safetensors(folder: Path, arrays: Arrays) -> None:
    """One uncompressed safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, folder / "scan.safetensors")


def read_safetensors(folder: Path, box: Box) -> list[NDArray]:
    """By slices."""
    from safetensors import safe_open

    with safe_open(folder / "scan.safetensors", framework="numpy") as file:
        return [np.ascontiguousarray(file.get_slice(name)[box]) for name in ("image", "anatomy_mask")]


def zarr_writer(chunks: tuple[int, int, int] | None, codec: str, shuffle: str) -> Callable[[Path, Arrays], None]:
    """Zarr arrays in chunk files; without `chunks`, slabs of 16 whole slices."""

    def write(folder: Path, arrays: Arrays) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        group = zarr.create_group(folder / "scan.zarr")
        for name, values in arrays.items():
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=chunks or (16, *values.shape[1:]),
                dtype=values.dtype,
                compressors=BloscCodec(cname=codec, clevel=5, shuffle=shuffle if name == "image" else "noshuffle"),
            )
            array[...] = values

    return write


def read_zarr(folder: Path, box: Box) -> list[NDArray]:
    """As zarr-python reads."""
    import zarr

    group = zarr.open_group(folder / "scan.zarr", mode="r")
    return [group[name][box] for name in ("image", "anatomy_mask")]


def write_ours(folder: Path, arrays: Arrays) -> None:
    """The store of the project."""
    write_scan(
        folder / "scan.zarr",
        *(arrays[name] for name in ("image", "anatomy_mask")),
        spacing_mm_dhw=(3, 1, 1),
        affine=np.eye(4),
        anatomies=labelled_anatomies("v2"),
    )


def read_ours(folder: Path, box: Box) -> list[NDArray]:
    """The crop reader of the project."""
    return list(read_crop(folder / "scan.zarr", [s.start for s in box], [s.stop - s.start for s in box]))


def blosc2_candidate() -> list[Candidate]:
    """The blosc2 container, where that package is installed."""
    try:
        import blosc2
    except ImportError:
        return []
    blosc2.set_nthreads(1)

    def write(folder: Path, arrays: Arrays) -> None:
        for name, values in arrays.items():
            filters = [blosc2.Filter.SHUFFLE if name == "image" else blosc2.Filter.NOFILTER]
            parameters = blosc2.CParams(codec=blosc2.Codec.LZ4HC, clevel=5, filters=filters, nthreads=1)
            chunks = (16, *values.shape[1:])
            blosc2.asarray(values, chunks=chunks, urlpath=str(folder / f"{name}.b2nd"), mode="w", cparams=parameters)

    def read(folder: Path, box: Box) -> list[NDArray]:
        return [blosc2.open(str(folder / f"{name}.b2nd"), mode="r")[box] for name in ("image", "anatomy_mask")]

    return [Candidate("blosc2, slabs, LZ4HC", write, read)]


def candidates() -> list[Candidate]:
    """All formats, the reference first."""
    return [
        Candidate("NIfTI, gzip (reference)", write_nifti, read_nifti),
        Candidate("npy, memory map", write_raw, read_raw),
        Candidate("safetensors, slices", write_safetensors, read_safetensors),
        Candidate("zarr, (28, 64, 64), zstd bitshuffle", zarr_writer((28, 64, 64), "zstd", "bitshuffle"), read_zarr),
        Candidate("zarr, (56, 64, 64), LZ4 shuffle", zarr_writer((56, 64, 64), "lz4", "shuffle"), read_zarr),
        Candidate("zarr, slabs, LZ4 shuffle", zarr_writer(None, "lz4", "shuffle"), read_zarr),
        Candidate("zarr, slabs, LZ4HC shuffle", zarr_writer(None, "lz4hc", "shuffle"), read_zarr),
        *blosc2_candidate(),
        Candidate("zarr shard, slabs, LZ4HC, by zarr-python", write_ours, read_zarr),
        Candidate("zarr shard, slabs, LZ4HC, by read_crop (ours)", write_ours, read_ours),
    ]


def measure(arrays: Arrays, num_crops: int, folder: Path) -> list[dict[str, float | int | str]]:
    """One record a candidate: bytes, files, and the median of the milliseconds per crop."""
    tried = candidates()
    folders = [folder / str(number) for number in range(len(tried))]
    for candidate, place in zip(tried, folders, strict=True):
        place.mkdir()
        candidate.write(place, arrays)
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in tried]
    for crop in range(num_crops + 1):  # the first one warms up
        start = [int(rng.integers(0, max(1, n - size + 1))) for n, size in zip(shape_of(arrays), CROP_DHW, strict=True)]
        box = tuple(slice(s, min(s + n, full)) for s, n, full in zip(start, CROP_DHW, shape_of(arrays), strict=True))
        for candidate, place, taken in zip(tried, folders, times, strict=True):
            began = time.perf_counter()
            read = candidate.read(place, box)
            if crop:
                taken.append(1000 * (time.perf_counter() - began))
            for name, values in zip(("image", "anatomy_mask"), read, strict=True):
                if not np.array_equal(values, arrays[name][box]):
                    raise AssertionError(f"{candidate.name} gives another crop")
    records = []
    for candidate, place, taken in zip(tried, folders, times, strict=True):
        files = [file.stat().st_size for file in place.rglob("*") if file.is_file()]
        records.append(
            {
                "format": candidate.name,
                "bytes": sum(files),
                "files": len(files),
                "ms_per_crop": statistics.median(taken),
                "ms_fastest": min(taken),
            }
        )
    return records


def shape_of(arrays: Arrays) -> tuple[int, ...]:
    """(D, H, W)."""
    return arrays["image"].shape


def print_table(records: list[dict], arrays: Arrays) -> None:
    """The records against the reference."""
    reference = records[0]
    print(f"scan {shape_of(arrays)}, crop {CROP_DHW}, image int16 and mask uint8\n")
    print(f"{'format':<46}{'MB':>8}{'x bytes':>9}{'files':>7}{'ms/crop':>9}{'fastest':>9}{'x faster':>10}")
    for record in records:
        print(
            f"{record['format']:<46}{record['bytes'] / 1e6:>8.2f}{record['bytes'] / reference['bytes']:>9.2f}"
            f"{record['files']:>7}{record['ms_per_crop']:>9.1f}{record['ms_fastest']:>9.1f}"
            f"{reference['ms_per_crop'] / record['ms_per_crop']:>10.1f}"
        )


def main() -> int:
    """Measure, print, and keep the records where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=15, help="random crops a format")
    parser.add_argument("--noise", type=float, default=15.0, help="standard deviation of the added noise, HU")
    parser.add_argument("--json", type=Path, help="file for the records")
    arguments = parser.parse_args()

    import torch
    import zarr
    from numcodecs import blosc

    torch.set_num_threads(1)
    zarr.config.set({"threading.max_workers": 1})
    blosc.set_nthreads(1)
    arrays = torso_arrays(arguments.noise)
    folder = Path(tempfile.mkdtemp(prefix="ct_store_"))
    try:
        records = measure(arrays, arguments.crops, folder)
    finally:
        shutil.rmtree(folder)
    print_table(records, arrays)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
