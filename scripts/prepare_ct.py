"""Prepare CT scans for training: geometry checked, resampled, cropped to the anatomies, stored for random crops.

    python scripts/prepare_ct.py --ct-rate /data/CT-RATE --split train --output prepared --workers 16
    python scripts/prepare_ct.py --rad-chestct /data/RadChestCT --split test --output rad --segment totalsegmentator
    python scripts/prepare_ct.py --table scans.csv --split train --output prepared

Broken off, it goes on where it was when started again. Scans that could not be used lie in
<output>/refused/<split>.jsonl with the reason; the index <output>/<split>-00000-of-00001.parquet is written last.
"""

import argparse
import logging
import sys
from pathlib import Path

from medclip_hf.data.ct.anatomy import THORACIC_ANATOMIES, labelled_anatomies
from medclip_hf.data.ct.engine import EngineReport, EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.segmenters import Segmenter
from medclip_hf.data.ct.sources import ScanSource, ct_rate_sources, rad_chestct_sources, table_sources, with_texts
from medclip_hf.data.reports.decomposition import NORMAL_RULES


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    contract, settings = GeometryContract(), EngineSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ct-rate", type=Path, help="folder of CT-RATE as downloaded")
    source.add_argument("--rad-chestct", type=Path, help="folder of Rad-ChestCT as downloaded")
    source.add_argument("--table", type=Path, help="CSV with the column 'image' and others, see data.ct.sources")
    parser.add_argument("--output", type=Path, required=True, help="folder of the prepared data set")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--tree", choices=("fixed", "older"), help="of CT-RATE; the fixed one where it is there")
    parser.add_argument("--segmentations", type=Path, help="label files of Rad-ChestCT, <scan>.nii.gz")
    parser.add_argument("--segment", help="label scans that lack it: 'totalsegmentator' or 'bundle:<folder>'")
    parser.add_argument(
        "--label-version", choices=("v1", "v2"), help="of TotalSegmentator's ids; v2, or the segmenter's"
    )
    parser.add_argument("--anatomies", default="thoracic", help="'thoracic' (4), 'all' or names with commas")
    parser.add_argument("--texts", type=Path, help="anatomy_texts.jsonl of scripts/decompose_reports.py")
    parser.add_argument("--normal-rule", choices=NORMAL_RULES, default=settings.normal_rule)
    parser.add_argument("--orientation", default=contract.orientation, help="where x, y, z grow to")
    parser.add_argument("--spacing", type=float, nargs=3, default=contract.spacing_mm_dhw, metavar=("D", "H", "W"))
    parser.add_argument("--margin", type=float, nargs=3, default=settings.margin_mm_dhw, metavar=("D", "H", "W"))
    parser.add_argument("--whole", action="store_true", help="keep whole scans instead of the box around the anatomies")
    parser.add_argument("--limit", type=int, help="prepare only so many scans")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Prepare the scans and print what came of them; 0 if there are any, 1 if none, 2 for an error, 130 if stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments(command_line)
    try:
        report = run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run again to go on from here\n")
        return 130
    print_report(report)
    return 0 if report.num_prepared else 1


def run(arguments: argparse.Namespace) -> EngineReport:
    """Find the scans, settle how they are to look, prepare them."""
    segmenter = Segmenter.from_text(arguments.segment) if arguments.segment else None
    sources = find_sources(arguments)[: arguments.limit]
    if arguments.texts:
        sources = with_texts(sources, arguments.texts)
    return prepare_scans(
        sources,
        arguments.output,
        arguments.split,
        named_settings(arguments, segmenter),
        num_workers=arguments.workers,
        segmenter=segmenter,
    )


def find_sources(arguments: argparse.Namespace) -> list[ScanSource]:
    """The scans of whichever source was named."""
    if arguments.ct_rate:
        return ct_rate_sources(arguments.ct_rate, arguments.split, arguments.tree)
    if arguments.rad_chestct:
        return rad_chestct_sources(arguments.rad_chestct, arguments.split, arguments.segmentations)
    return table_sources(arguments.table)


def named_settings(arguments: argparse.Namespace, segmenter: Segmenter | None) -> EngineSettings:
    """The engine's settings out of the command line."""
    version = arguments.label_version or (segmenter.label_version if segmenter else "v2")
    names = {"thoracic": THORACIC_ANATOMIES, "all": labelled_anatomies(version)}
    anatomies = names.get(arguments.anatomies) or tuple(name.strip() for name in arguments.anatomies.split(","))
    return EngineSettings(
        contract=GeometryContract(orientation=arguments.orientation, spacing_mm_dhw=tuple(arguments.spacing)),
        anatomies=anatomies,
        label_version=version,
        margin_mm_dhw=None if arguments.whole else tuple(arguments.margin),
        normal_rule=arguments.normal_rule,
    )


def print_report(report: EngineReport) -> None:
    """Say what the run did."""
    print(
        f"{report.num_prepared} scans prepared ({report.num_resumed} by an earlier run, "
        f"{report.num_without_texts} without a report)"
    )
    for reason, count in report.refused.items():
        print(f"{count} refused: {reason}")
    print(f"index: {report.index}")


if __name__ == "__main__":
    sys.exit(main())
