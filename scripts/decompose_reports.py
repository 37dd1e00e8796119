"""Decompose radiology reports into what they say of each anatomy, and tell how well that went.

    python scripts/decompose_reports.py --reports train_reports.csv --output decomposed
    python scripts/decompose_reports.py --reports train_reports.csv --output decomposed --anatomies all
    python scripts/decompose_reports.py --reports train_reports.csv --output decomposed --llm Qwen/Qwen2.5-7B-Instruct

Writes anatomy_texts.jsonl (a line a study), set_aside.jsonl (reports that were not decomposed, with the reason) and
quality.json. With --llm the model's answers are kept in answers.jsonl: broken off, the run goes on from there.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medclip_hf.data.ct.anatomy import ALL_ANATOMIES, THORACIC_ANATOMIES
from medclip_hf.data.reports.decomposition import NORMAL_RULES, assemble_texts, decompose_reports
from medclip_hf.data.reports.tables import Decompose, ReportColumns, decompose_table, read_reports


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    columns = ReportColumns()
    parser.add_argument("--reports", type=Path, required=True, help="CSV table, CT-RATE's columns by default")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--anatomies", default="thoracic", help="'thoracic' (4), 'all' (36) or names with commas")
    parser.add_argument("--normal-rule", choices=NORMAL_RULES, default="impression")
    parser.add_argument("--study-column", default=columns.study)
    parser.add_argument("--findings-column", default=columns.findings)
    parser.add_argument("--impression-column", default=columns.impression)
    parser.add_argument("--llm", default=None, help="instruct model of transformers: folder or Hub name")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time, with --llm")
    return parser.parse_args()


def main() -> int:
    """Decompose the table, write the figures and print them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    try:
        quality = run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print_quality(quality)
    if not quality["num_reports"]:
        sys.stderr.write(f"error: no report was decomposed; the reasons are in {arguments.output}/set_aside.jsonl\n")
        return 1
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the run, whose results lie in the output folder afterwards."""
    anatomies = named_anatomies(arguments.anatomies)
    assemble_texts([], [], anatomies)  # wrong names show before the first report is read
    columns = ReportColumns(arguments.study_column, arguments.findings_column, arguments.impression_column)
    rows = tqdm(read_reports(arguments.reports, columns), unit="row", desc="decompose")
    model: dict[str, Any] = {}
    if arguments.llm:
        from medclip_hf.data.reports.llm import AnswerFile, LLMReportDecomposer

        arguments.output.mkdir(parents=True, exist_ok=True)
        decomposer = LLMReportDecomposer.from_pretrained(
            arguments.llm,
            anatomies,
            normal_rule=arguments.normal_rule,
            batch_size=arguments.batch_size,
            answers=AnswerFile(arguments.output / "answers.jsonl"),
        )
        quality = decompose_table(rows, arguments.output, anatomies, decomposer.decompose).to_dict()
        model = {"llm": {"model": arguments.llm} | decomposer.counts.to_dict()}
    else:
        by_rules: Decompose = partial(decompose_reports, anatomies=anatomies, normal_rule=arguments.normal_rule)
        quality = decompose_table(rows, arguments.output, anatomies, by_rules).to_dict()
    quality = quality | {"normal_rule": arguments.normal_rule} | model
    text = json.dumps(quality, indent=2, ensure_ascii=False)
    (arguments.output / "quality.json").write_text(f"{text}\n", encoding="utf-8")
    return quality


def named_anatomies(choice: str) -> tuple[str, ...]:
    """The anatomies of --anatomies."""
    lists = {"thoracic": THORACIC_ANATOMIES, "all": ALL_ANATOMIES}
    return lists.get(choice) or tuple(name.strip() for name in choice.split(",") if name.strip())


def print_quality(quality: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{quality['num_reports']:,} reports decomposed, set aside: {quality['num_set_aside'] or 'none'}")
    print(
        f"{quality['num_sentences']:,} sentences, {quality['unassigned_rate']:.1%} without anatomy; "
        f"words they share: {', '.join(word for word, _ in quality['unassigned_words'][:10]) or '(too few reports)'}"
    )
    print(f"{'anatomy':<26} {'with text':>10} {'normal':>8} {'captions':>10}")
    for name, figures in quality["anatomies"].items():
        print(
            f"{name:<26} {figures['num_with_text']:>10,} {figures['normal_rate']:>8.1%} {figures['num_captions']:>10,}"
        )
    if "llm" in quality:
        print(f"by the model: {quality['llm']}")


if __name__ == "__main__":
    sys.exit(main())
