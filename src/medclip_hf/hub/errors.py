"""What went wrong with the Hub, in one sentence that says what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client that huggingface_hub uses: without an answer, the connection failed
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class HubError(ValueError):
    """A request of the Hub that failed.

    Args:
        message: what was asked, what came and what to do.
        status: of the HTTP answer; None where none came.
        is_passing: whether the same request may succeed a little later.
        retry_after_s: seconds that the Hub asks to wait; None where it names none.
    """

    def __init__(
        self, message: str, status: int | None = None, *, is_passing: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_passing = is_passing
        self.retry_after_s = retry_after_s


@contextmanager
def hub_errors(repo_id: str, endpoint: str | None = None) -> Iterator[None]:
    """Turns what fails inside, with this repository, into `HubError`; other errors pass.

    Args:
        repo_id: that is asked for.
        endpoint: address of the Hub or mirror; by default that of HF_ENDPOINT.

    Raises:
        HubError: with the failure as its cause.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        explained = explain(error, repo_id, endpoint)
        if explained is None:
            raise
        raise explained from error


def explain(error: BaseException, repo_id: str, endpoint: str | None = None) -> HubError | None:
    """The sentence for a failure, wrapped ones included; None for one that is not of the Hub, or says enough itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HubError):
            return cause
        if sentence := _sentence(cause, repo_id, endpoint or constants.ENDPOINT):
            return _with_facts_of_the_answer(sentence, cause)
        if isinstance(cause, ValueError):  # of huggingface_hub, about what was to be sent
            return None
        cause = cause.__cause__ or cause.__context__
    return None


def _with_facts_of_the_answer(sentence: str, error: BaseException) -> HubError:
    if not isinstance(error, HfHubHTTPError):
        is_connection = isinstance(error, HTTPError | ConnectionError | TimeoutError)
        return HubError(sentence, is_passing=is_connection and not isinstance(error, OfflineModeIsEnabled))
    status = error.response.status_code
    asked = error.response.headers.get("Retry-After", "").strip()
    return HubError(
        sentence,
        status,
        is_passing=status == 429 or status >= 500,
        retry_after_s=float(asked) if asked.isdigit() else None,
    )


def _sentence(error: BaseException, repo_id: str, where: str) -> str | None:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: HF_HUB_OFFLINE is set, so nothing was asked of {where}. Unset it, or use what is cached."
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{repo_id} is not in the cache of this disk, and {where} could not be asked. Check the network, or "
            "download the repository once where there is one."
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated. Open {where}/{repo_id}, accept its conditions, and run `hf auth login` with that "
            "account's token."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision. Give a branch, a tag or a full commit of {where}/{repo_id}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{where} shows no repository {repo_id} to you: the name is wrong, or it is private and your token may not "
            "see it. Check the name, and log in with `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{repo_id} lacks a file that was asked for. Check the revision, and that it is a repository of this kind."
        )
    if isinstance(error, HFValidationError):
        return (
            f"{repo_id!r} is no repository on the Hub and no folder on this disk. Repositories are named 'owner/name'."
        )
    if isinstance(error, HfHubHTTPError):
        return _sentence_of_status(error, repo_id, where)
    if isinstance(error, json.JSONDecodeError):
        return f"{where} answered with something that no Hub says. Check HF_ENDPOINT, and a proxy in between."
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"The connection to {where} failed while it was asked for {repo_id}. Check the network and try again."
    return None


def _sentence_of_status(error: HfHubHTTPError, repo_id: str, where: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{where} does not accept your token. Run `hf auth login`, or set HF_TOKEN to a token that is valid."
    if status == 403:
        return (
            f"Your token may not do this with {repo_id}. Use a token with write permission, or ask the owner of the "
            "repository for it."
        )
    if status in (409, 412):
        return (
            f"{repo_id} was changed by somebody else in the meantime, or that name is taken. Nothing was added: look "
            f"at {where}/{repo_id} and try again."
        )
    if status == 429:
        asked = error.response.headers.get("Retry-After", "").strip()
        wait = f"{asked} seconds" if asked.isdigit() else "a while"
        return f"{where} got too many requests from you. Wait {wait} and try again."
    if status >= 500:
        return f"{where} failed ({status}) when asked for {repo_id}. Try again later."
    said = f": {error.server_message}" if error.server_message else ""
    return f"{where} refused the request for {repo_id} ({status}){said}."
