"""Turn the published MedConcept JSON lines and their images into Parquet shards with repaired concept spans.

    python scripts/import_medconcept.py --source medconcept_23m.jsonl --images oa_images --output figures --workers 16

Interrupted, it goes on where it was when started again. What was dropped lies in <output>/<split>.dropped.jsonl.
"""

import argparse
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from medclip_hf.data.medconcept import ImportPlan, ImportState, import_medconcept


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="JSON lines: caption, image, umls_meta_info")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that the image paths of the lines start from"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument(
        "--keep-paths", action="store_true", help="rows name their image instead of holding it; --images below --output"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that check lines and images (0: this one)")
    return parser.parse_args(arguments)


def main(command_line: list[str] | None = None) -> int:
    """Run the import and print what was kept and what was dropped; 0 if rows were kept, 1 if none, 2 for an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments(command_line)
    plan = ImportPlan(
        source=arguments.source,
        image_folder=arguments.images,
        output=arguments.output,
        split=arguments.split,
        rows_per_shard=arguments.rows_per_shard,
        embed_images=not arguments.keep_paths,
    )
    try:
        total = plan.source.stat().st_size if plan.source.is_file() else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=plan.split) as bar:
            state = import_medconcept(plan, arguments.workers, Progress(bar).show)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(state.rows.table("rows"))
    print(state.concepts.table("concepts"))
    print(f"{state.num_shards} shards in {plan.output}")
    if not state.rows.kept:
        sys.stderr.write(f"error: no row was kept; the reasons are in {plan.output}/{plan.split}.dropped.jsonl\n")
        return 1
    return 0


class Progress:
    """A bar over the bytes of the source, with lines per second of this run and the kept share of all runs."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.lines_before: int | None = None

    def show(self, state: ImportState) -> None:
        """Move the bar to where the import is."""
        if self.lines_before is None:  # what earlier runs did
            self.lines_before = state.num_lines - 1
        seconds = self.bar.format_dict["elapsed"]
        rate = (state.num_lines - self.lines_before) / seconds if seconds else 0.0
        note = f"{state.num_lines:,} rows, {rate:,.0f} rows/s, {state.rows.kept_share:.1%} kept"
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(state.end_byte - self.bar.n)


if __name__ == "__main__":
    sys.exit(main())
