"""Downloads files of a model's repository on the hub: each is there with the hash that the hub has for it, or
is not there.

huggingface_hub lists them and carries their bytes, over Xet where the hub has a file so. What it leaves to
others is done here: a file that was broken off goes on where it ended (over HTTP; Xet begins it anew), no
file gets its name before its hash has been compared, and disk space is looked at before the first byte.

Files lie as huggingface_hub has them, in its cache or in a folder of one's own (file_download.py,
_local_folder.py), so that its own tools find them.
"""

from __future__ import annotations

import glob
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import http_get, repo_folder_name, xet_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils._runtime import is_xet_available

from r1_cluster.weights.headers import INDEX, SINGLE
from r1_cluster.weights.hub import Published, downloads, from_etag, metadata_of, published
from r1_cluster.weights.stream import FULL, locked, sync, write_whole

BESIDE = (
    "config.json",
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
"""What is needed beside the weights, by this engine or another."""

_AT_ONCE = 8  # files, as huggingface_hub has it
_CHUNK_BYTES = 4 << 20
_MAX_FAILURES, _PAUSE_S = 5, 1.0
_PATIENCE_S = 5.0  # how long the other files' threads are waited for once one has failed
_KEPT = "what is finished is kept, and the same command goes on from there"

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, and of how many."""


class DownloadError(ValueError):
    """It cannot begin or go on; the message says what to do."""


class _Stopped(Exception):
    """Another file has failed."""


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it: its bytes, its hash, and whether it is in Xet."""

    num_bytes: int
    published: Published
    is_xet: bool


@dataclass(frozen=True)
class Repo:
    """A model's repository at one commit: the files of its top folder by name."""

    name: str
    commit: str
    files: Mapping[str, Remote]


def open_repo(name: str, revision: str | None) -> Repo:
    """Asks the hub (HF_ENDPOINT) which files there are. Raises DownloadError."""
    with _told(name, revision):
        api = HfApi()
        commit = api.resolve_revision(name, revision=revision).resolved
        files = {}
        for entry in api.list_repo_tree(name, revision=commit):
            if isinstance(entry, RepoFile) and "/" not in entry.path and entry.path.isprintable():
                etag = entry.blob_id if entry.lfs is None else entry.lfs.sha256
                hash_ = from_etag(etag)
                if hash_ is None:
                    raise DownloadError(f"the hub has no hash for {entry.path} of {name}, but {etag[:80]!r}")
                num_bytes = entry.size if entry.lfs is None else entry.lfs.size
                files[entry.path] = Remote(num_bytes, hash_, entry.xet_hash is not None)
    if "config.json" not in files:
        raise DownloadError(f"{name} has no config.json, and so is no model in Hugging Face format")
    if INDEX not in files and SINGLE not in files:
        others = sorted(file for file in files if file.endswith((".safetensors", ".bin", ".pth", ".gguf")))
        shown = f"what it has is {', '.join(others[:3])}" if others else "it has no weights"
        raise DownloadError(f"{name} has neither {SINGLE} nor {INDEX}; {shown}: take a repository that has")
    return Repo(name, commit, files)


class Download:
    """Files of one repository, on their way into a folder of one's own, or into huggingface_hub's cache
    (HF_HOME)."""

    def __init__(self, repo: Repo, folder: Path | None) -> None:
        """Nothing is written yet. Without a folder, the cache."""
        self.repo = repo
        if folder is not None:
            self.folder = self._root = folder
            self._blobs: Path | None = None
            self._partials = downloads(folder)
        else:
            cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
            self._root = cache / repo_folder_name(repo_id=repo.name, repo_type="model")
            self.folder = self._root / "snapshots" / repo.commit
            self._blobs = self._root / "blobs"
            self._partials = self._root / "downloads"

    def fetch(self, names: Iterable[str], progress: Progress | None = None) -> int:
        """Fetches the files that are not there whole; returns how many bytes it fetched. Raises
        DownloadError; what is finished then is kept."""
        with _told(self.repo.name):
            for needed in (self.folder, self._partials, *([self._blobs] if self._blobs else [])):
                needed.mkdir(parents=True, exist_ok=True)
            with locked(self._root):
                self._remove_former()
                return self._fetch_missing([*names], _Counter(progress))

    def _remove_former(self) -> None:
        """Weights of another state of the repository go from a folder before anything of this one comes: half
        of each would look like a checkpoint."""
        if self._blobs is not None:
            return  # each state has a folder of its own there
        for name, remote in self.repo.files.items():
            path = self.folder / name
            if name.endswith(".safetensors") and published(path) not in (None, remote.published):
                path.unlink(missing_ok=True)
                metadata_of(path).unlink(missing_ok=True)
        sync(self.folder)

    def _fetch_missing(self, names: list[str], counter: _Counter) -> int:
        files = self.repo.files
        known = {name for name in names if self._is_known(name)}
        unknown = [name for name in names if name not in known and self._has_size(name)]
        counter.begin(sum(files[name].num_bytes for name in unknown))
        for name in unknown:
            if _digest(self.folder / name, files[name], counter.update) == files[name].published.value:
                self._say_known(name)
                known.add(name)
        left = [name for name in names if name not in known]
        parts = {name: self._partial(name) for name in left}
        needed = sum(files[name].num_bytes - part.stat().st_size for name, part in parts.items())
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise DownloadError(
                f"{self._root} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB more are needed for "
                f"{len(left)} files; make room, or name a folder on another disk"
            )
        counter.begin(needed)
        _in_threads(left, lambda name: self._fetch(name, parts[name], counter), counter.stopped)
        return needed

    def _is_known(self, name: str) -> bool:
        """Whether a file is there whose hash has been compared, and that nobody has written to since."""
        path, remote = self.folder / name, self.repo.files[name]
        if self._blobs is not None and (self._blobs / remote.published.value).exists():
            self._link(name)  # another commit may have brought it
        if not self._has_size(name) or published(path) != remote.published:
            return False
        with suppress(FileNotFoundError):
            # The time of the last change, which a file's being moved to this name sets as well.
            return metadata_of(path).stat().st_ctime_ns >= path.stat().st_ctime_ns
        return True  # a link to a blob, which has its hash for a name

    def _has_size(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.repo.files[name].num_bytes

    def _partial(self, name: str) -> Path:
        """Where a file is until it is whole; its name holds the hash, so that two states of the hub do not
        mix. What is left of another state is removed."""
        remote = self.repo.files[name]
        partial = self._partials / f"{name}.{remote.published.value}.partial"
        for other in self._partials.glob(f"{glob.escape(name)}.*.partial"):
            if other.name.count(".") != partial.name.count("."):
                continue  # of a file whose name begins so
            goes_on = other == partial and other.stat().st_size <= remote.num_bytes
            if not goes_on or _over_xet(remote):
                other.unlink()
        partial.touch()
        return partial

    def _fetch(self, name: str, partial: Path, counter: _Counter) -> None:
        remote = self.repo.files[name]
        url = hf_hub_url(self.repo.name, name, revision=self.repo.commit)
        # Compressed on the way, a file could not go on in its middle.
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        xet = get_hf_file_metadata(url, headers=headers).xet_file_data if _over_xet(remote) else None
        if xet is None:
            _over_http(url, headers, partial, remote, counter)
        else:
            try:
                xet_get(
                    incomplete_path=partial,
                    xet_file_data=xet,
                    headers=headers,
                    expected_size=remote.num_bytes,
                    displayed_filename=name,
                    tqdm_class=counter.bar(),
                )
            except (RuntimeError, OSError) as error:
                without = "HF_HUB_DISABLE_XET=1 does without it"
                raise DownloadError(
                    f"{name} could not be had over Xet ({error}); {_KEPT}; {without}"
                ) from error
        sync(partial)
        found = _digest(partial, remote, lambda _: counter.check())
        if found != remote.published.value:
            partial.unlink()
            raise DownloadError(
                f"{name} came with {remote.published.kind} hash {found}, the hub's is "
                f"{remote.published.value}: it was damaged on its way, or whoever answers has another file; "
                "it was removed, and the same command fetches it again"
            )
        if self._blobs is None:
            metadata_of(self.folder / name).unlink(missing_ok=True)  # it speaks of the former file
            partial.replace(self.folder / name)
            self._say_known(name)
        else:
            partial.replace(self._blobs / remote.published.value)
            self._link(name)

    def _link(self, name: str) -> None:
        """From the cache's snapshot to its blob."""
        link = self._partials / f"{name}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "..", "blobs", self.repo.files[name].published.value))
        link.replace(self.folder / name)

    def _say_known(self, name: str) -> None:
        """Leaves what the hub said of a file in a folder of one's own, in huggingface_hub's form."""
        path, value = self.folder / name, self.repo.files[name].published.value
        if self._blobs is None:
            sync(self.folder)
            write_whole(metadata_of(path), f"{self.repo.commit}\n{value}\n{time.time()}\n".encode())


class _Counter:
    """Bytes done, counted by several threads."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._total = 0
        self.stopped = threading.Event()

    def begin(self, total: int) -> None:
        """Counts anew, up to `total`."""
        self._done, self._total = 0, total

    def check(self) -> None:
        """Raises _Stopped where all are to stop."""
        if self.stopped.is_set():
            raise _Stopped

    def update(self, num_bytes: int) -> None:
        """So many more are done, or so many have to be done again if it is negative. Raises _Stopped."""
        self.check()
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def bar(self) -> Any:
        """What huggingface_hub takes for the class of its progress bars."""
        update = self.update

        class Bar:
            def __init__(self, *_: object, **__: object) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, num_bytes: float | None = 1) -> None:
                update(int(num_bytes or 0))

            def update_transfer(self, num_bytes: float | None = 1) -> None:
                """What has come over Xet and is not written yet."""

            def set_postfix_str(self, text: str, refresh: bool = True) -> None:
                """Rates are ours to show."""

            set_transfer_postfix_str = set_postfix_str

            def close(self) -> None:
                pass

        return Bar


def _over_xet(remote: Remote) -> bool:
    return remote.is_xet and is_xet_available()


def _over_http(url: str, headers: dict[str, str], partial: Path, remote: Remote, counter: _Counter) -> None:
    """Fetches what a partial file lacks. `http_get` opens a connection again that was closed or is silent;
    here it is opened again after a reset, and after an error of the server's."""
    failures = 0  # without anything new between them
    with partial.open("ab") as file:
        while True:
            had = file.tell()
            try:
                http_get(
                    url,
                    file,
                    resume_size=had,
                    headers=headers,
                    expected_size=remote.num_bytes,
                    displayed_filename=partial.name,
                    tqdm_class=counter.bar(),
                )
                return
            except (httpx2.ReadError, HfHubHTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                failures = failures + 1 if file.tell() == had else 0
                if failures == _MAX_FAILURES:
                    raise
                time.sleep(_PAUSE_S)


def _in_threads(names: Iterable[str], fetch: Callable[[str], None], stopped: threading.Event) -> None:
    """Several at a time. The first failure ends all, and is raised. Who interrupts us does not wait for
    threads that hang on a connection: they are ended with the process, which leaves what a kill leaves."""
    waiting, failures = deque(names), list[BaseException]()

    def work() -> None:
        with suppress(IndexError, _Stopped):
            while not stopped.is_set():
                name = waiting.popleft()
                try:
                    fetch(name)
                except BaseException as error:
                    failures.append(error)
                    stopped.set()
                    raise _Stopped from None

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(waiting)))]
    for thread in threads:
        thread.start()
    try:
        while not stopped.is_set() and (alive := [thread for thread in threads if thread.is_alive()]):
            alive[0].join(0.05)
    except KeyboardInterrupt:
        stopped.set()
        raise
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    if failures:
        raise failures[0]


def _digest(path: Path, remote: Remote, more: Callable[[int], None]) -> str:
    digest = remote.published.begin(path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            more(len(chunk))
    return digest.hexdigest()


@contextmanager
def _told(repo: str, revision: str | None = None) -> Iterator[None]:
    """All that may go wrong, in words."""
    try:
        yield
    except RevisionResolutionError as error:
        raise DownloadError(_words(error.__cause__ or error, repo, revision)) from None
    except (httpx2.HTTPError, OSError, HFValidationError) as error:
        raise DownloadError(_words(error, repo, revision)) from error


def _words(error: BaseException, repo: str, revision: str | None) -> str:
    hub = constants.ENDPOINT
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so nothing is downloaded; unset it, or use what is there already"
        case HFValidationError():
            return f"{repo!r} is no name of a repository; they look like deepseek-ai/DeepSeek-R1"
        case GatedRepoError():
            return (
                f"{repo} is gated: ask for access at {hub}/{repo}, and set HF_TOKEN to a token of the "
                "account that has it"
            )
        case RevisionNotFoundError():
            return (
                f"{repo} has no revision {revision or 'main'!r}; --revision takes a branch, a tag or a commit"
            )
        case RepositoryNotFoundError():
            return (
                f"{hub} knows no repository {repo}, or shows it to some accounts alone: look at the name, "
                "and for a private one set HF_TOKEN"
            )
        case HfHubHTTPError() if (status := error.response.status_code) in (401, 403):
            return f"{hub} refuses access to {repo} ({status}): look at HF_TOKEN, and at what it may read"
        case HfHubHTTPError():
            return f"{hub} answers {error.response.status_code} for {repo}: try again later; {_KEPT}"
        case httpx2.HTTPError():
            why = str(error) or type(error).__name__
            return f"{hub} cannot be reached ({why}): look at the network, or at HF_ENDPOINT; {_KEPT}"
        case BlockingIOError():
            return f"somebody else downloads {repo} to the same place; let it end"
        case OSError() if error.errno in FULL:
            return f"there is no room left ({os.strerror(error.errno)}): make room; {_KEPT}"
        case OSError() if error.errno:
            return f"{error.filename or repo}: {os.strerror(error.errno)}"
        case _:  # huggingface_hub's own, of a file that ended too early
            return f"{' '.join(str(error).split())}; {_KEPT}"
