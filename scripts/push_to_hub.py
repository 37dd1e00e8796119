"""Push a model, adapter, data set or Space to the Hub: private, checked file by file before anything leaves.

    python scripts/push_to_hub.py adapter our-clinic/conceptclip-films --key ~/hospital.key --dry-run
    python scripts/push_to_hub.py model our-clinic/model --key ~/hospital.key
    python scripts/push_to_hub.py model our-clinic/model --table films.csv --identifying-columns pid,name
    python scripts/push_to_hub.py model me/phantom-model --no-patients

The identifiers searched for are those that scripts/prepare_hospital.py left beside the key, or the columns of a table.
A finding stops the push and names file and place.
"""

import argparse
import csv
import logging
import secrets
import sys
from pathlib import Path

from medclip_hf.data.hospital.pseudonyms import KEY_BYTES, Pseudonyms, read_or_create_key
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.data.hospital.table import listed
from medclip_hf.hub.errors import HubError
from medclip_hf.hub.push import files_to_push, push_folder
from medclip_hf.hub.push_checks import Finding, check_before_push


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to push")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--repo-type", choices=("model", "dataset", "space"), default="model")
    who = parser.add_argument_group("identifiers (one of these)")
    who.add_argument("--key", type=Path, help="key of scripts/prepare_hospital.py; identifiers lie beside it")
    who.add_argument("--table", type=Path, help="CSV of the patients, with --identifying-columns")
    who.add_argument("--no-patients", action="store_true", help="nothing of a patient went into these files")
    parser.add_argument("--identifying-columns", default="", help="of --table, with commas")
    parser.add_argument("--separator", default=",", help="of --table")
    parser.add_argument("--encoding", default="utf-8-sig", help="of --table")
    parser.add_argument("--allow-images", action="store_true", help="pictures that show no patient, of a card")
    parser.add_argument("--allow-words", default="", help="parts of names that are harmless here, with commas")
    parser.add_argument("--public", action="store_true", help="for everyone to see; private otherwise")
    parser.add_argument("--message", default="Upload with medclip-hf", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files; send nothing")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Check, then push; 0 if sent (or clean), 1 for findings, 2 for an error, 130 if stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = parse_arguments(command_line)
    try:
        return run(arguments)
    except (ValueError, HubError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing half sent: all files go in one commit\n")
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Check the folder and send it if nothing was found."""
    identifiers = named_identifiers(arguments)
    if identifiers is not None and identifiers.num_too_short:
        sys.stderr.write(f"{identifiers.num_too_short} identifiers are too short to be searched for\n")

    def check(folder: Path) -> list[Finding]:
        return check_before_push(
            folder,
            identifiers,
            arguments.repo_type,
            allow_images=arguments.allow_images,
            allowed_words=listed(arguments.allow_words),
        )

    findings = check(arguments.folder)
    for finding in findings:
        sys.stderr.write(f"{finding}\n")
    if findings:
        sys.stderr.write(f"nothing was sent: {len(findings)} findings\n")
        return 1
    if arguments.dry_run:
        files = files_to_push(arguments.folder, arguments.repo_type)
        print(f"clean: {len(files)} files, {sum(path.stat().st_size for path in files.values()):,} bytes")
        for name in files:
            print(f"  {name}")
        return 0
    pushed = push_folder(
        arguments.folder,
        arguments.repo_id,
        repo_type=arguments.repo_type,
        private=not arguments.public,
        message=arguments.message,
        check=check,  # again, right before the files are read: what was written meanwhile is checked as well
    )
    print(f"{pushed.url} at {pushed.commit}, {'public' if arguments.public else 'private'}")
    return 0


def named_identifiers(arguments: argparse.Namespace) -> SearchSet | None:
    """The identifiers to search for.

    Raises:
        ValueError: where it is not said whose they are, or they cannot be read.
    """
    if sum(map(bool, (arguments.key, arguments.table, arguments.no_patients))) != 1:
        raise ValueError("say whose identifiers to search for: exactly one of --key, --table and --no-patients")
    if arguments.no_patients:
        return None
    if arguments.key:
        if not arguments.key.expanduser().is_file():
            raise ValueError(f"no key at {arguments.key}")
        pseudonyms = read_or_create_key(arguments.key, arguments.folder)
        path = arguments.key.expanduser()
        return SearchSet.load(path.with_name(f"{path.name}.identifiers.json"), pseudonyms)
    search_set = SearchSet(Pseudonyms(secrets.token_bytes(KEY_BYTES)))  # lives as long as this process
    search_set.add(cells_of_table(arguments))
    if not len(search_set):
        raise ValueError(f"{arguments.table} holds no identifier in these columns that could be searched for")
    return search_set


def cells_of_table(arguments: argparse.Namespace) -> list[str]:
    """The cells of the named columns; what is wrong with the table is said without them."""
    columns = listed(arguments.identifying_columns)
    if not columns:
        raise ValueError("name the columns of --table that identify patients: --identifying-columns")
    try:
        with arguments.table.open(encoding=arguments.encoding, newline="") as file:
            reader = csv.DictReader(file, delimiter=arguments.separator)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{arguments.table} lacks the columns {missing}. Is the separator right?")
            return [row[name] for row in reader for name in columns if row[name]]
    except UnicodeError:
        raise ValueError(f"{arguments.table} is not in {arguments.encoding}. Name its encoding.") from None


if __name__ == "__main__":
    sys.exit(main())
