"""Build a training set of figures, captions and concepts from articles or from a table of images and captions.

    python scripts/build_medconcept.py --config scripts/recipes/medconcept.yaml --workers 16
    python scripts/build_medconcept.py --config scripts/recipes/medconcept.yaml --engine ray --workers 512
    python scripts/build_medconcept.py --config scripts/recipes/medconcept.yaml --push-to my-group/figures

Single values of the recipe are changed with --set source.path=... . Broken off, it goes on where it was when started
again. What was dropped lies in <output.folder>/dropped, each record with its reason.
"""

import argparse
import logging
import sys
from pathlib import Path

from tqdm import tqdm

from medclip_hf.data.engine.run import EngineReport, Progress, build_medconcept
from medclip_hf.data.engine.settings import SECTIONS, EngineSettings
from medclip_hf.data.workers import ProcessRunner, Runner
from medclip_hf.hub.push import push_folder
from medclip_hf.hub.push_checks import Finding, check_before_push
from medclip_hf.training.arguments import build_sections, read_recipe


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, see scripts/recipes/medconcept.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    parser.add_argument("--workers", type=int, default=0, help="processes, or Ray actors (0: this process, Ray: all)")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes")
    parser.add_argument(
        "--ray-address", help="of a Ray cluster ('auto': the one of this node); default: start one here"
    )
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, help="of a Ray actor, where a model runs")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="upload the finished data set to the Hub")
    parser.add_argument("--public", action="store_true", help="the uploaded data set is readable by everybody")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Build the data set, print what came of it; 0 if figures were kept, 1 if none, 2 for an error, 130 if stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments(command_line)
    try:
        settings = EngineSettings(**build_sections(read_recipe(arguments.config, arguments.set), SECTIONS))
        with ProgressBars() as bars:
            report = build_medconcept(settings, make_runner(arguments), bars.show)
        if arguments.push_to and any(report.num_figures.values()):
            push(settings, arguments.push_to, arguments.public)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run again to go on from here\n")
        return 130
    print_report(report, settings)
    return 0 if report.tally.kept else 1


def make_runner(arguments: argparse.Namespace) -> Runner:
    """What does the tasks."""
    if arguments.engine == "processes":
        return ProcessRunner(arguments.workers)
    from medclip_hf.data.engine.ray import RayRunner

    return RayRunner(arguments.workers or None, arguments.ray_address, arguments.gpus_per_worker)


def push(settings: EngineSettings, repository: str, is_public: bool) -> None:
    """Upload the finished data set, whose pictures may be seen, unless a path, a token or a leftover is found in it."""

    def check(folder: Path) -> list[Finding]:
        return check_before_push(folder, None, "dataset", allow_images=True)

    print(push_folder(settings.folder, repository, repo_type="dataset", private=not is_public, check=check).url)


def print_report(report: EngineReport, settings: EngineSettings) -> None:
    """Say what the run did."""
    print(f"{report.num_items:,} items of the source")
    print(report.tally.table("records"))
    print(", ".join(f"{count:,} {split}" for split, count in report.num_figures.items()))
    if report.num_evaluation_images:
        print(f"{report.num_contaminated:,} figures show one of {report.num_evaluation_images:,} evaluation images")
    if not report.tally.kept:
        sys.stderr.write(f"error: no figure was kept; the reasons are in {settings.folder}/dropped\n")
    print(f"data set: {settings.folder}")


class ProgressBars:
    """One bar for each step: rate, kept share and the time that is left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.step = ""

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, progress: Progress) -> None:
        """Move the bar of the step to where it is."""
        if self.bar is None or self.step != progress.step:
            self.__exit__()
            # What earlier runs did counts in the bar, not in the rate.
            self.bar = tqdm(total=progress.num_items, initial=progress.num_resumed, unit="", desc=progress.step)
            self.step = progress.step
        self.bar.set_postfix_str(f"{progress.kept_share:.1%} kept", refresh=False)
        self.bar.update(progress.num_done - self.bar.n)


if __name__ == "__main__":
    sys.exit(main())
