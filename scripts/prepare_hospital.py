"""Prepare a hospital's files for training, so that nothing in the result identifies a patient.

    python scripts/prepare_hospital.py --table films.csv --root /archive --output prepared --key ~/hospital.key \
        --text-column report --label-columns effusion,nodule --identifying-columns name,birth_date
    python scripts/prepare_hospital.py --table ct.csv --root /archive --output prepared_ct --key ~/hospital.key \
        --text-column findings --impression-column impression --segmentation-column labels --workers 4

The key is created where there is none; keep it, and keep it to yourself. Broken off, the run goes on where it was when
started again. Rows that could not be used lie in <output>/dropped/rows.jsonl, by their number in the table. Beside the
key, <key>.identifiers.json holds the hashed identifiers that scripts/push_to_hub.py searches for.
"""

import argparse
import logging
import sys
from pathlib import Path

from medclip_hf.data.ct.anatomy import THORACIC_ANATOMIES, labelled_anatomies
from medclip_hf.data.ct.engine import EngineSettings
from medclip_hf.data.ct.segmenters import Segmenter
from medclip_hf.data.hospital.free_text import PHONE_REGIONS
from medclip_hf.data.hospital.pictures import PictureSettings
from medclip_hf.data.hospital.prepare import Job, prepare_hospital
from medclip_hf.data.hospital.pseudonyms import read_or_create_key
from medclip_hf.data.hospital.rows import DatasetFacts
from medclip_hf.data.hospital.split import SplitShares
from medclip_hf.data.hospital.table import TableColumns, listed, read_table
from medclip_hf.data.hospital.work import PrepareSettings


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="CSV with one row a file")
    parser.add_argument("--root", type=Path, help="folder that its paths are relative to; that of the table by default")
    parser.add_argument("--output", type=Path, required=True, help="folder of the prepared data set")
    parser.add_argument("--key", type=Path, required=True, help="file of the secret key, outside of the output")
    parser.add_argument("--separator", help="between the cells; a comma by default ('\\t' for a tab)")
    parser.add_argument("--encoding", help="of the table; UTF-8 by default")
    add_columns(parser.add_argument_group("columns"))
    add_pictures(parser.add_argument_group("pictures and CT"))
    privacy = parser.add_argument_group("privacy")
    privacy.add_argument("--burned-in", choices=("refuse", "mask", "keep"), default="refuse", help="text in pictures")
    privacy.add_argument("--without-presidio", action="store_true", help="texts by rules and known names alone")
    privacy.add_argument("--ner-model", help="installed spaCy model that finds names in texts")
    privacy.add_argument("--phone-regions", default=",".join(PHONE_REGIONS), help="countries of phone numbers")
    privacy.add_argument("--allow-words", default="", help="in class names though patients are called so, with commas")
    privacy.add_argument("--min-group", type=int, default=5, help="patients that a scanner or body part must have")
    split = parser.add_argument_group("splits")
    split.add_argument("--shares", type=float, nargs=3, default=(0.7, 0.15, 0.15), metavar=("TRAIN", "VAL", "TEST"))
    split.add_argument("--duplicates", choices=("report", "drop"), default="report", help="of pictures across splits")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 prepares in this one")
    return parser.parse_args(command_line)


def add_columns(group: argparse._ArgumentGroup) -> None:
    """Which column holds what."""
    columns = TableColumns()
    group.add_argument("--path-column", default=columns.path)
    group.add_argument("--patient-column", default=columns.patient)
    for name in ("study", "text", "impression", "split", "sex", "age", "scanner", "series", "segmentation"):
        group.add_argument(f"--{name}-column")
    group.add_argument("--label-column", help="one column with the name of the class")
    group.add_argument("--label-columns", help="columns of 1, 0 or nothing, with commas; those named 'label:…' if none")
    group.add_argument(
        "--identifying-columns", default="", help="names, addresses, …: searched for in texts, with commas"
    )


def add_pictures(group: argparse._ArgumentGroup) -> None:
    """How files are read."""
    pictures, engine = PictureSettings(), EngineSettings()
    group.add_argument("--kind", choices=("figures", "scans"), help="told from the files where not named")
    group.add_argument("--mixed", choices=("refuse", "report"), default="refuse", help="several kinds or modalities")
    group.add_argument("--modalities", default="", help="DICOM modalities to take, with commas; all by default")
    group.add_argument("--frames", choices=("first", "middle", "all"), default=pictures.frames)
    group.add_argument("--window", type=float, nargs=2, metavar=("CENTRE", "WIDTH"), help="instead of the files' own")
    group.add_argument("--max-side", type=int, default=pictures.max_side, help="pixels; 0 keeps the size")
    group.add_argument("--anatomies", default="thoracic", help="of CT: 'thoracic' (4), 'all' or names with commas")
    group.add_argument("--label-version", choices=("v1", "v2"), help="of TotalSegmentator's ids; v2 by default")
    group.add_argument("--segment", help="label CT that lacks it: 'totalsegmentator' or 'bundle:<folder>'")
    group.add_argument("--margin", type=float, nargs=3, default=engine.margin_mm_dhw, metavar=("D", "H", "W"))
    group.add_argument("--whole", action="store_true", help="keep whole scans instead of the box around the anatomies")


def main(command_line: list[str] | None = None) -> int:
    """Prepare the data and print what came of it; 0 if all went well, 2 for an error, 130 if stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments(command_line)
    try:
        facts = run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run again to go on from here\n")
        return 130
    print_report(facts, arguments.output)
    return 0


def run(arguments: argparse.Namespace) -> DatasetFacts:
    """Read the table, get the key, prepare."""
    separator = {"\\t": "\t", "tab": "\t"}.get(arguments.separator, arguments.separator)
    table = read_table(arguments.table, named_columns(arguments), separator=separator, encoding=arguments.encoding)
    job = Job(
        table=table,
        root=arguments.root or arguments.table.parent,
        output=arguments.output,
        pseudonyms=read_or_create_key(arguments.key, arguments.output),
        settings=named_settings(arguments),
        engine=named_engine(arguments),
        segmenter=Segmenter.from_text(arguments.segment) if arguments.segment else None,
        search_set=arguments.key.with_name(f"{arguments.key.name}.identifiers.json"),
        num_workers=arguments.workers,
    )
    return prepare_hospital(job)


def named_columns(arguments: argparse.Namespace) -> TableColumns:
    """The columns out of the command line."""
    single = ("path", "patient", "study", "text", "impression", "label", "split", "sex", "age", "scanner", "series")
    named = {name: getattr(arguments, f"{name}_column") for name in (*single, "segmentation")}
    labels = tuple(listed(arguments.label_columns)) if arguments.label_columns else None
    return TableColumns(**named, labels=labels, identifying=tuple(listed(arguments.identifying_columns)))


def named_settings(arguments: argparse.Namespace) -> PrepareSettings:
    """The settings out of the command line."""
    window = tuple(arguments.window) if arguments.window else None
    return PrepareSettings(
        kind=arguments.kind,
        mixed=arguments.mixed,
        modalities=tuple(listed(arguments.modalities)),
        pictures=PictureSettings(frames=arguments.frames, window=window, max_side=arguments.max_side),
        burned_in=arguments.burned_in,
        shares=SplitShares(*arguments.shares),
        duplicates=arguments.duplicates,
        use_presidio=not arguments.without_presidio,
        ner_model=arguments.ner_model,
        phone_regions=tuple(listed(arguments.phone_regions)),
        allowed_words=tuple(listed(arguments.allow_words)),
        min_group=arguments.min_group,
    )


def named_engine(arguments: argparse.Namespace) -> EngineSettings:
    """The CT engine's settings out of the command line."""
    segmenter = Segmenter.from_text(arguments.segment) if arguments.segment else None
    version = arguments.label_version or (segmenter.label_version if segmenter else "v2")
    names = {"thoracic": THORACIC_ANATOMIES, "all": labelled_anatomies(version)}
    return EngineSettings(
        anatomies=names.get(arguments.anatomies) or tuple(listed(arguments.anatomies)),
        label_version=version,
        margin_mm_dhw=None if arguments.whole else tuple(arguments.margin),
    )


def print_report(facts: DatasetFacts, output: Path) -> None:
    """Say what the run did, in numbers alone."""
    for split, counts in facts.counts.items():
        labels = ", ".join(f"{name} {count}" for name, count in counts["present"].items())
        print(f"{split}: {counts['rows']} rows of {counts['patients']} patients" + (f" ({labels})" if labels else ""))
    for reason, count in facts.report["dropped"].items():
        print(f"{count} set aside: {reason}")
    replaced = ", ".join(f"{count} × {kind}" for kind, count in facts.report["replaced_in_texts"].items())
    print(f"replaced in {facts.report['texts_changed']} texts: {replaced or 'nothing'}")
    print(f"{facts.report['duplicates_across_splits']} pairs of pictures look the same across splits")
    if facts.report["may_show_a_face"]:
        print(f"{facts.report['may_show_a_face']} examinations of the head: a face can be told from their voxels")
    if facts.report["identifiers_too_short"]:
        print(f"{facts.report['identifiers_too_short']} identifiers are too short to be searched for before a push")
    print(f"data set: {output}")


if __name__ == "__main__":
    sys.exit(main())
