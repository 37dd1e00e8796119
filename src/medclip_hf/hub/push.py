"""A folder to the Hub: private unless said otherwise, in one commit, or not at all.

Models, processors, adapters, data sets and Spaces go the same way. `huggingface_hub.upload_folder` may split a folder
into several commits, so that a failure leaves half of it on the Hub; here every file is in the same commit, and a
repository that was made for a push that then failed is taken away again.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from medclip_hf.data.engine.publish import PUBLISHED_FILES
from medclip_hf.hub.cards import ModelFacts, write_card
from medclip_hf.hub.errors import HubError, hub_errors
from medclip_hf.hub.push_checks import check_before_push, leads_out_of
from medclip_hf.hub.results import checked_repository_id

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset", "space"]

# Unpickling runs code, and the states of a run hold what it saw: neither belongs on the Hub.
REFUSED_FILES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
HIDDEN_FILES_SENT = (".eval_results", ".gitattributes", ".streamlit")
FIRST_FILES: dict[str, tuple[str, ...]] = {
    "model": ("config.json", "adapter_config.json", "processor_config.json"),
    "dataset": ("README.md",),
    "space": ("README.md",),
}

# Files that only make sense together: what the folder no longer has goes from the repository in the same commit.
# Weights of an earlier push in one file would win over newer ones in several; old shards would be read with the new.
FILES_THAT_BELONG_TOGETHER: dict[str, tuple[tuple[str, ...], ...]] = {
    "model": (("model*.safetensors", "model.safetensors.index.json"), ("adapter_model*.safetensors",)),
    "dataset": (("*.parquet", "*.manifest.json"),),
    "space": (),
}

PATIENCE_S = 120.0
_FIRST_WAIT_S = 1.0


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Args:
        repo_id: `owner/name`.
        commit: give it as `revision` to load exactly these files.
        url: of the repository.
        files: that the commit holds, as paths in the repository.
        removed: of an earlier push, which belonged to those replaced.
    """

    repo_id: str
    commit: str
    url: str
    files: tuple[str, ...]
    removed: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: RepoType = "model",
    private: bool = True,
    message: str = "Upload with medclip-hf",
    check: Callable[[Path], Sequence[Any]] | None = None,
    api: HfApi | None = None,
    patience_s: float = PATIENCE_S,
) -> Pushed:
    """Push a folder in one commit; the repository is made where there is none.

    Files that did not change are not sent again, so the same push may be repeated after a failure.

    Args:
        folder: as `save_pretrained`, a data engine or a Space wrote it.
        repo_id: `owner/name`.
        repo_type: what kind of repository it is.
        private: whether a new repository is private. A public one is then refused: that it is public must be said.
        message: of the commit.
        check: called with the folder before anything is sent; what it finds stops the push. By default
            `check_before_push` without identifiers of patients: it finds paths, tokens, names of this user and machine,
            leftovers of runs. What saw patients is pushed by `scripts/push_to_hub.py`, which knows whom to search for.
        api: to reach the Hub with; by default with the token of the environment.
        patience_s: seconds to go on trying while the Hub asks to wait, fails, or does not answer.

    Raises:
        ValueError: a folder that is not whole, or holds what must not be sent; nothing was sent.
        HubError: the Hub refused or could not be reached; nothing was added.
    """
    checked_repository_id(repo_id, "repo_id")
    folder = Path(folder)
    files = files_to_push(folder, repo_type)
    findings = check_before_push(folder, None, repo_type) if check is None else check(folder)
    if findings:
        listed = "; ".join(str(finding) for finding in findings[:20])
        raise ValueError(f"Nothing was sent: the check of {folder.name} found {len(findings)} problems: {listed}")
    push = _Push(api or HfApi(), files, repo_id, repo_type, private, message)
    try:
        return _with_patience(push, patience_s)
    except BaseException:  # an interrupt as well
        push.take_back()
        raise


def push_pretrained(
    parts: Sequence[Any],
    repo_id: str,
    *,
    facts: ModelFacts | None = None,
    **options: Any,
) -> Pushed:
    """Push a model, its processor, its adapter, or several of them together with their card.

    Args:
        parts: objects with `save_pretrained`.
        repo_id: `owner/name`.
        facts: of the card; without them there is none.
        options: as for `push_folder`.

    Raises:
        ValueError: as `push_folder`.
        HubError: as `push_folder`.
    """
    with tempfile.TemporaryDirectory(prefix="medclip-hf-push-") as folder:
        for part in parts:
            part.save_pretrained(folder)
        if facts is not None:
            write_card(folder, facts)
        elif Path(folder, "README.md").exists():  # PEFT's empty form, which names the folder of the base model
            Path(folder, "README.md").unlink()
        return push_folder(folder, repo_id, **options)


def files_to_push(folder: str | Path, repo_type: RepoType = "model") -> dict[str, Path]:
    """Path in the repository -> file of the folder, in order of their names.

    Hidden files and caches stay behind; of a data set all but its rows and its card.

    Raises:
        ValueError: no folder, one without the file that makes it a repository of its kind, pickled files or the state
            of a run, a link out of the folder, an adapter whose base is a folder of this disk.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Save there first, then push it.")
    files = {}
    sent = PUBLISHED_FILES if repo_type == "dataset" else ["*"]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _stays_behind(name):
            continue
        if leads_out_of(folder, path) or (path.is_symlink() and path.is_dir()):
            raise ValueError(
                f"{name} is a link out of {folder}, or to a folder. Put a copy in its place, or remove it."
            )
        if path.is_file() and any(fnmatch(name, pattern) for pattern in sent):
            files[name] = path
    if refused := [name for name in files if any(fnmatch(name.lower(), pattern) for pattern in REFUSED_FILES)]:
        raise ValueError(
            f"{refused} can run code when read, or are the state of a run. Remove them: weights are pushed as "
            "safetensors alone."
        )
    if not any(name in files for name in FIRST_FILES[repo_type]):
        raise ValueError(f"{folder} is no {repo_type}: it has none of {list(FIRST_FILES[repo_type])}. Push its folder.")
    if "adapter_config.json" in files:
        _check_base_of_adapter(files["adapter_config.json"])
    return files


def _stays_behind(name: str) -> bool:
    first, *rest = name.split("/")
    if first in HIDDEN_FILES_SENT:
        return False
    return any(part.startswith(".") or part == "__pycache__" for part in (first, *rest))


def _check_base_of_adapter(path: Path) -> None:
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        is_here = base is not None and Path(base).exists()
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no configuration of an adapter: {error}. Save the adapter again.") from error
    if is_here:
        raise ValueError(
            f"{path.name} names a folder of this disk as the base model, which nobody else has. Push the base first, "
            "and set base_model_name_or_path to its 'owner/name'."
        )


@dataclass
class _Push:
    """One push, which may take several tries."""

    api: HfApi
    files: dict[str, Path]
    repo_id: str
    repo_type: RepoType
    private: bool
    message: str
    was_absent: bool = False  # the repository is there because of this push
    first_commit: str | None = None  # what the newest one was before ours

    def try_once(self) -> Pushed:
        """Make the repository where there is none, and commit."""
        self._make_repository()
        self.first_commit = self.api.repo_info(self.repo_id, repo_type=self.repo_type).sha
        there = self.api.list_repo_files(self.repo_id, repo_type=self.repo_type, revision=self.first_commit)
        removed = _outdated(there, self.files, self.repo_type)
        # Made anew for every try: these objects remember what was uploaded.
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in self.files.items()]
        commit = self.api.create_commit(
            self.repo_id,
            [*added, *(CommitOperationDelete(path_in_repo=name) for name in removed)],
            commit_message=self.message,
            repo_type=self.repo_type,
            parent_commit=self.first_commit,
        )
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[self.repo_type]
        url = f"{self.api.endpoint}/{prefix}{self.repo_id}"
        logger.info("Pushed %d files to %s at %s", len(self.files), url, commit.oid)
        return Pushed(self.repo_id, commit.oid, url, tuple(self.files), tuple(removed))

    def _make_repository(self) -> None:
        try:
            info = self.api.repo_info(self.repo_id, repo_type=self.repo_type)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            self._create()
            return
        if self.private and not info.private:
            raise HubError(
                f"{self.repo_id} is public, and pushing to it publishes the files. Say so with private=False, or push "
                "to another repository."
            )

    def _create(self) -> None:
        self.was_absent = True  # from before the request, whose answer may get lost
        sdk = "gradio" if self.repo_type == "space" else None
        try:
            self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, space_sdk=sdk)
        except HfHubHTTPError as error:
            if error.response.status_code == 409:  # somebody else was faster: it is theirs
                self.was_absent = False
            raise

    def take_back(self) -> None:
        """Remove the repository that was made for a push that failed, unless something came to be in it."""
        if not self.was_absent:
            return
        try:
            with hub_errors(self.repo_id, self.api.endpoint):
                there: Any = self.api.repo_info(self.repo_id, repo_type=self.repo_type)
                if {file.rfilename for file in there.siblings or ()} <= {".gitattributes"}:
                    self.api.delete_repo(self.repo_id, repo_type=self.repo_type)
        except HubError as error:
            if error.status not in (401, 404):  # those say that it never came to be
                logger.warning("Perhaps the empty repository %s was left behind: %s", self.repo_id, error)


def _with_patience(push: _Push, patience_s: float) -> Pushed:
    """What was pushed, tried again while the Hub asks to wait, fails, or does not answer, for so many seconds."""
    waited_s, pause_s = 0.0, _FIRST_WAIT_S
    while True:
        try:
            with hub_errors(push.repo_id, push.api.endpoint):
                return push.try_once()
        except HubError as error:
            next_s = max(pause_s, error.retry_after_s or 0.0)
            if not error.is_passing or waited_s + next_s > patience_s:
                raise
            logger.warning("%s Trying again in %.0f s.", error, next_s)
        time.sleep(next_s)
        waited_s, pause_s = waited_s + next_s, pause_s * 2


def _outdated(there: Sequence[str], files: dict[str, Path], repo_type: RepoType) -> list[str]:
    """Files of an earlier push that belong together with some of these, and are none of them."""
    removed = []
    for patterns in FILES_THAT_BELONG_TOGETHER[repo_type]:
        if any(fnmatch(name, pattern) for name in files for pattern in patterns):
            removed += [
                name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in patterns)
            ]
    return sorted(removed)
