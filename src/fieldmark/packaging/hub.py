"""A repository of the Hugging Face hub as a place for packages: one push is one commit. Torch-free.

Tokens are those of huggingface_hub (`hf auth login`, or HF_TOKEN); none is read or shown here.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fieldmark.errors import ConfigError, FieldmarkError, IntegrityError, PlaceError, require
from fieldmark.packaging.draft import Draft
from fieldmark.packaging.entries import FileEntry
from fieldmark.packaging.manifest import CARD, MANIFEST
from fieldmark.packaging.places import CHUNK_BYTES, HUB, one_line, read_chunks
from fieldmark.runtime.files import sha256_bytes
from fieldmark.runtime.log import console, say

TIMEOUT_S = 10.0  # of the first question: whoever is offline hears of it soon
_ADDRESS = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_OF_EVERY_REPOSITORY = {".gitattributes", CARD}
_LOG_IN = "Run: hf auth login, or set HF_TOKEN."


class Api(Protocol):
    """What is used of huggingface_hub.HfApi."""

    def repo_info(self, repo_id: str, *, revision: str | None, timeout: float) -> Any:
        """Return what has `sha`, the commit that a revision means."""

    def list_repo_tree(self, repo_id: str, *, revision: str) -> Iterable[Any]:
        """Return what have `path`, of the top level."""

    def get_paths_info(self, repo_id: str, paths: list[str], *, revision: str) -> list[Any]:
        """Return what have `path`, `size`, `blob_id` and `lfs`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository."""

    def create_commit(
        self,
        repo_id: str,
        operations: Iterable[Any],
        *,
        commit_message: str,
        revision: str | None,
        parent_commit: str | None,
    ) -> Any:
        """Return what has `oid`, the commit."""


def open_hub(address: str, *, must_exist: bool) -> "HubPlace":
    """Return the repository of hf:OWNER/NAME[@REVISION].

    Raises:
        ConfigError: not such an address.
        MissingDependency: huggingface_hub is not installed.
    """
    found = _ADDRESS.fullmatch(address.removeprefix(HUB))
    if found is None:
        raise ConfigError(
            f"a repository of the hub must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION. "
            f"Got {address!r}."
        )
    require("huggingface_hub", "hub", "a repository of the hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not console.is_terminal:
        disable_progress_bars()
    return HubPlace(found[1], found[2], HfApi(), must_exist=must_exist)


class HubPlace:
    """A model repository at one revision."""

    def __init__(
        self, repo_id: str, revision: str | None, api: Api, *, must_exist: bool = False
    ) -> None:
        """Name the repository; it is asked when it is read."""
        self.words = f"{HUB}{repo_id}" + (f"@{revision}" if revision else "")
        self._repo_id, self._revision, self._api = repo_id, revision, api
        self._commit: str | None = None  # what the revision means, so that all files are of one
        self._must_exist = must_exist
        self._asked = self._exists = False

    def read(self, name: str, at_most: int) -> bytes | None:
        """Return a file's content, cut after `at_most` bytes; None: no such file or repository."""
        from huggingface_hub.errors import EntryNotFoundError

        self._ask()
        if self._commit is None:
            return None
        with self._explained():
            try:
                with self._stream(name) as file:
                    return bytes(file.read(at_most))
            except (EntryNotFoundError, FileNotFoundError):
                return None

    def chunks(self, name: str, at_most: int) -> Iterator[bytes]:
        """Yield a file's content in parts, and stop after `at_most` bytes."""
        self._ask()
        with self._explained(), self._stream(name) as file:
            yield from read_chunks(file, at_most)

    def check_writer(self) -> None:
        """Raise PlaceError unless there is a token, before work is done for a push."""
        from huggingface_hub import get_token

        with self._explained():
            if get_token() is None:
                raise PlaceError(f"{self.words} takes packages of who is logged in. {_LOG_IN}")

    def strangers(self) -> list[str]:
        """Return the names in the repository but for those that every one has."""
        self._ask()
        if self._commit is None:
            return []
        with self._explained():
            tree = self._api.list_repo_tree(self._repo_id, revision=self._commit)
            return sorted({entry.path for entry in tree} - _OF_EVERY_REPOSITORY)

    def send(self, draft: Draft, card: bytes, old: Iterable[str]) -> None:
        """Commit files, model card and manifest at once, then compare what the hub says it has.

        A repository that does not exist yet is made, and private.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = draft.manifest.files
        with self._explained():
            if not self._exists:
                self._api.create_repo(self._repo_id, private=True, exist_ok=True)
                say(f"{self.words} is new, and private: its settings page can make it public")
            added = {name: draft.content(name) for name in files}
            added |= {CARD: card, MANIFEST: draft.text}
            operations: list[Any] = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in added.items()
            ]
            stale = sorted({*old} - {*added})
            operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
            self._send(operations, f"Package {draft.manifest.name} {draft.id[:12]}")
            self._compare(draft, card)

    def send_card(self, card: bytes) -> None:
        """Put another model card beside the package that is here."""
        from huggingface_hub import CommitOperationAdd

        with self._explained():
            self._send([CommitOperationAdd(CARD, card)], "Model card")

    def finish(self) -> None:
        """Do nothing: a commit leaves nothing half sent."""

    def _ask(self) -> None:
        """Find the commit that the revision means; the repository need not exist."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        if self._asked:
            return
        with self._explained():
            try:
                info = self._api.repo_info(
                    self._repo_id, revision=self._revision, timeout=TIMEOUT_S
                )
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                if self._must_exist or self._revision is not None:
                    raise
            else:
                self._exists, self._commit = True, info.sha
        self._asked = True

    def _stream(self, name: str) -> Any:
        from huggingface_hub import HfFileSystem

        endpoint = getattr(self._api, "endpoint", None)
        files = HfFileSystem(endpoint=endpoint, token=getattr(self._api, "token", None))
        path = f"{self._repo_id}@{self._commit}/{name}"
        return files.open(path, "rb", block_size=0)  # one request, and no more than is read

    def _send(self, operations: list[Any], message: str) -> None:
        done = self._api.create_commit(
            self._repo_id,
            operations,
            commit_message=message,
            revision=self._revision,
            parent_commit=self._commit,  # fails if another was there in between
        )
        self._commit, self._exists = done.oid, True

    def _compare(self, draft: Draft, card: bytes) -> None:
        wanted = dict(draft.manifest.files) | {
            name: FileEntry(sha256=sha256_bytes(data), bytes=len(data))
            for name, data in ((CARD, card), (MANIFEST, draft.text))
        }
        found = {}
        names = [*wanted]
        for start in range(0, len(names), 500):
            some = names[start : start + 500]
            for entry in self._api.get_paths_info(self._repo_id, some, revision=str(self._commit)):
                found[entry.path] = entry
        for name, entry in wanted.items():
            data = {CARD: card, MANIFEST: draft.text}.get(name)
            there = found.get(name)
            if there is None or there.size != entry.bytes or not _same(there, entry, draft, data):
                raise IntegrityError(
                    f"{name} of {self.words} must be what was sent. At commit {self._commit} it "
                    "is not. Push again with --replace."
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into a PlaceError of one sentence."""
        try:
            yield
        except FieldmarkError:
            raise
        # It passes on what its HTTP library raises, which is another one from version to version.
        except Exception as error:  # noqa: BLE001
            raise PlaceError(self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        from huggingface_hub import errors

        words = self.words
        if isinstance(error, errors.OfflineModeIsEnabled):
            return (
                f"{words} must be reachable. HF_HUB_OFFLINE is set. Unset it, or use a folder: "
                "file:///FOLDER."
            )
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{words} must be open to you. It is gated. Ask for access on its page, "
                "then run: hf auth login."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{words} must be a branch, tag or commit that exists. Make it on the hub first."
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{words} must exist and be open to you. The hub does not know it, or it is "
                f"private. {_LOG_IN}"
            )
        if isinstance(error, errors.HfHubHTTPError):
            return self._refusal(error)
        return (
            f"{words} must be reachable. {type(error).__name__}: {one_line(error)}. Check the "
            "network, or use a folder: file:///FOLDER."
        )

    def _refusal(self, error: Any) -> str:
        status = error.response.status_code
        said = " ".join(str(error.server_message or "").split())[:200].rstrip(".")
        said = f" It says: {said}." if said else ""
        advice = {
            400: "Check the name, and the head of README.md.",
            401: f"The token is missing or not valid. {_LOG_IN}",
            402: "Make room in your storage there, or pay for more.",
            403: "Use a token that may write there.",
            409: "Somebody changed it meanwhile. Push again.",
            412: "Somebody changed it meanwhile. Push again.",
            413: "Make room in your storage there.",
            429: "Wait some minutes and try again.",
            507: "Make room in your storage there.",
        }.get(status, "Try again later." if status >= 500 else "Read what it says.")
        return f"{self.words} must accept this. The hub refused with {status}.{said} {advice}"


def _same(there: Any, entry: FileEntry, draft: Draft, data: bytes | None) -> bool:
    """Whether the hub's checksum is ours: SHA-256 of a large file, git's SHA-1 of another."""
    if there.lfs is not None:
        return bool(there.lfs.sha256 == entry.sha256)
    digest = hashlib.sha1(b"blob %d\0" % entry.bytes, usedforsecurity=False)
    with io.BytesIO(data) if data is not None else draft.open(there.path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return bool(digest.hexdigest() == there.blob_id)
