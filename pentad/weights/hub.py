"""Models of the Hugging Face hub, through huggingface_hub and its own cache.

huggingface_hub itself reads HF_ENDPOINT (the server), HF_HOME (the cache), HF_TOKEN and HF_HUB_OFFLINE. It checks the
size of each download; this module checks the SHA-256.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pentad.errors import BadInput, PentadError
from pentad.weights.cache import FULL_DISK, Progress, check_space, storage_error, task

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

# huggingface_hub reads this when it is imported, which the functions below do.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "merges.txt", "vocab.txt")
"""Configs, tokenizers and chat templates beside the weights."""
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "tokenizer.bin")
FOREIGN_WEIGHTS = (".pth", ".pt", ".onnx", ".h5", ".msgpack", ".ckpt", ".npz", ".tflite")
PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.[a-z]+$)")
"""In the name of a split file's part, as llama.cpp and transformers write it."""
NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
    r"(?::(?P<file>[A-Za-z0-9][\w.-]*))?",
    re.ASCII,
)
STORAGE_ERRORS = (*FULL_DISK, errno.EACCES, errno.EPERM, errno.EROFS)
MAX_LISTED = 40  # files named in a message


@dataclass(frozen=True)
class HubName:
    """`repo[@revision][:file]`; `file` is a GGUF file's quantization, or its whole name."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


class CachedRepo(NamedTuple):
    """A repository in Hugging Face's cache that can be opened; `path` is its newest snapshot."""

    name: str
    path: Path
    nbytes: int


class RemoteFile(NamedTuple):
    """A file in the hub's listing; `sha256` only of files in large-file storage, such as weights."""

    nbytes: int
    sha256: str | None


def parse(name: str) -> HubName:
    """Split `org/name[@revision][:file]`; BadInput if it is not a valid name."""
    match = NAME.fullmatch(name)
    if match is None or ".." in name or "//" in name or "--" in match["repo"] or len(match["repo"]) > 96:
        expected = "expected org/name[@revision][:quantization], of letters, digits and . _ -"
        raise BadInput(f"model name is {name!r}; {expected}")
    return HubName(match["repo"], match["revision"], match["file"])


def pull(name: HubName, progress: Progress) -> Path:
    """Download what the cache lacks; if the hub doesn't answer, use what is cached.

    Returns:
        The snapshot's folder, or the GGUF file (of a split one the first part).

    Raises:
        BadInput: the repository, revision or file does not exist, or the name fits several files.
        PentadError: the repository is gated, or the download fails.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import RevisionNotFoundError

    with _explained(name):
        try:
            commit, files = _list_files(name)
        except RevisionNotFoundError:
            raise
        except Exception:  # offline, unreachable, no longer allowed: each has its own class
            if (cached := _find_cached(name)) is not None:
                return cached
            raise
        paths, entry = _choose(name, list(files))
        found = [path for path in paths if isinstance(try_to_load_from_cache(name.repo, path, revision=commit), str)]
        missing = {path: files[path] for path in paths if path not in found}
        total = sum(file.nbytes for file in missing.values()) or None
        check_space(Path(constants.HF_HUB_CACHE), total or 0, "free some, or set HF_HOME to a folder on another disk")
        with task(progress, f"{'downloading' if missing else 'looking up'} {name}", total):
            patterns, bar = [glob.escape(path) for path in paths], _bar_class(progress)
            folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns, tqdm_class=bar))
        for path, file in missing.items():
            _check(name, folder / path, file, progress)
        return folder / entry if entry else folder


def cached_repos() -> list[CachedRepo]:
    """The models in Hugging Face's cache that have a config.json, a params.json or a GGUF file, by name."""
    rows = []
    for repo in _scan_models():
        revision = max(repo.revisions, key=lambda revision: revision.last_modified)
        names = [file.file_name for file in revision.files]
        if any(name in ("config.json", "params.json") or name.endswith(".gguf") for name in names):
            rows.append(CachedRepo(repo.repo_id, revision.snapshot_path, repo.size_on_disk))
    return sorted(rows)


def remove(name: HubName) -> int:
    """Remove a repository, or one revision of it, from Hugging Face's cache.

    Returns:
        The bytes freed.

    Raises:
        BadInput: it isn't cached, or `name` names one file of it.
    """
    from huggingface_hub import constants

    if name.file is not None:
        raise BadInput(f"cannot remove one file of a repository: remove all of {name.repo}")
    commits = [revision.commit_hash for revision in _cached_revisions(name.repo, name.revision)]
    if not commits:
        raise BadInput(f"{name} is not in the cache: nothing to remove")
    try:
        strategy = _scan().delete_revisions(*commits)
        strategy.execute()
    except OSError as error:
        raise storage_error(error, Path(constants.HF_HUB_CACHE), "HF_HOME") from error
    if any(path.exists() for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs)):
        raise PentadError(f"could not remove all of {name} from {constants.HF_HUB_CACHE}: check its permissions")
    return strategy.expected_freed_size


def _list_files(name: HubName) -> tuple[str, Mapping[str, RemoteFile]]:
    """The revision's commit, and its files by path."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name.repo, revision=name.revision or "main", files_metadata=True)
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if not path.is_absolute() and ".." not in path.parts:
            files[file.rfilename] = RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
    return info.sha or "", files


def _choose(name: HubName, files: Sequence[str]) -> tuple[list[str], str | None]:
    """The files of a repository to download, and the one to open (None: their folder)."""
    top = sorted(path for path in files if "/" not in path)
    side_files = [path for path in top if any(fnmatch(path, pattern) for pattern in SIDE_FILES)]
    safetensors = [path for path in top if path.endswith(".safetensors")]
    # Some repositories hold their weights twice, the second time as `consolidated`.
    weights = [path for path in safetensors if not path.startswith("consolidated")] or safetensors
    weights = weights or [path for path in top if path.endswith(".bin") and path not in NOT_WEIGHTS]
    weights = weights or [path for path in top if fnmatch(path, "consolidated.*.pt*")]
    if name.file is None and weights:
        _check_parts(name, weights)
        return [*side_files, *weights], None
    ggufs = _gguf_groups(files)
    if name.file is not None or ggufs:
        parts = _choose_gguf(name, ggufs)
        _check_parts(name, parts)
        return parts, parts[0]
    if {"config.json", "params.json"}.intersection(top) and not any(path.endswith(FOREIGN_WEIGHTS) for path in top):
        return side_files, None
    formats = "safetensors, .bin, consolidated, GGUF"
    raise BadInput(f"{name} holds no weights that pentad opens ({formats}); files: {_listing(top) or 'none'}")


def _gguf_groups(files: Sequence[str]) -> dict[str, list[str]]:
    """The GGUF files that are models; the parts of a split one are grouped under its path without numbers."""
    groups: dict[str, list[str]] = {}
    for path in sorted(files):
        if path.endswith(".gguf") and not re.search("mmproj|imatrix", path, re.IGNORECASE):
            groups.setdefault(PART.sub("", path), []).append(path)
    return groups


def _choose_gguf(name: HubName, groups: Mapping[str, list[str]]) -> list[str]:
    """The parts of the one file that `name` names; ":q4_k" is Q4_K, and not Q4_K_M."""
    matching = list(groups)
    if name.file is not None:
        wanted = re.escape(name.file.removesuffix(".gguf"))
        matching = [group for group in groups if re.search(rf"(?:^|[-_./]){wanted}(?=[-./])", group, re.IGNORECASE)]
    if len(matching) == 1:
        return groups[matching[0]]
    listing = _listing([Path(group).stem for group in matching or groups])
    if not groups:
        raise BadInput(f"{name.repo} holds no GGUF file: leave out `:{name.file}`")
    if not matching:
        raise BadInput(f"{name.repo} holds no GGUF file called {name.file}; files: {listing}")
    raise BadInput(f"{name} matches several GGUF files; name one as in {name.repo}:{listing}")


def _check_parts(name: HubName, files: Sequence[str]) -> None:
    """Raise BadInput for a split file of which parts are missing."""
    parts = [(PART.sub("", path), int(part[1])) for path in files if (part := PART.search(path))]
    for (group, count), found in Counter(parts).items():
        if found != count:
            raise BadInput(f"{name.repo} holds only {found} of the {count} parts of {group}")


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _find_cached(name: HubName) -> Path | None:
    """The path that `pull` would return, if the cache holds everything."""
    for revision in _cached_revisions(name.repo, name.revision or "main"):
        files = [file.file_path.relative_to(revision.snapshot_path).as_posix() for file in revision.files]
        with contextlib.suppress(BadInput):  # the wanted files are not there
            paths, entry = _choose(name, files)
            if any(path.endswith((".safetensors", ".bin", ".gguf")) for path in paths):
                return revision.snapshot_path / (entry or "")
    return None


def _cached_revisions(repo_id: str, name: str | None) -> "list[CachedRevisionInfo]":
    """A repository's cached revisions: those of this name (a commit, branch or tag), or all."""
    revisions = [revision for repo in _scan_models() if repo.repo_id == repo_id for revision in repo.revisions]
    return [revision for revision in revisions if name in (None, revision.commit_hash, *revision.refs)]


def _scan() -> "HFCacheInfo":
    from huggingface_hub import constants, scan_cache_dir

    return scan_cache_dir(constants.HF_HUB_CACHE)


def _scan_models() -> "list[CachedRepoInfo]":
    from huggingface_hub import CacheNotFound

    try:
        return [repo for repo in _scan().repos if repo.repo_type == "model" and repo.revisions]
    except CacheNotFound:
        return []


def _check(name: HubName, path: Path, file: RemoteFile, progress: Progress) -> None:
    """Compare a downloaded file with the hub's SHA-256; delete it if they differ."""
    expected = file.sha256
    if expected is None and path.is_symlink():
        # A mirror may leave the hash out of its listing, but the cache names such files by it.
        blob = Path(os.readlink(path)).name
        expected = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    if expected is None:
        return
    digest = hashlib.sha256()
    with task(progress, f"checking {path.name}", file.nbytes), open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            progress.advance(len(chunk))
    if digest.hexdigest() != expected:
        path.resolve().unlink(missing_ok=True)  # the blob to which the snapshot's link points
        path.unlink(missing_ok=True)
        hashes = f"SHA-256 is {digest.hexdigest()}; expected {expected}"
        raise PentadError(f"{path.name} of {name} arrived damaged ({hashes}): it was deleted; pull again")


def _bar_class(progress: Progress) -> type[Any]:
    """A bar for huggingface_hub that draws nothing and reports the bytes to `progress`.

    huggingface_hub may count the same bytes on two bars, as received and as written: the fuller one is reported.
    """
    from huggingface_hub.utils.tqdm import tqdm

    lock, reported = threading.Lock(), 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counted = kwargs.get("initial") or 0 if kwargs.get("unit") == "B" else None
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            if self.counted is not None:
                with lock:
                    self.counted += int(n or 0)
                    if self.counted > reported:
                        progress.advance(self.counted - reported)
                        reported = self.counted

    return Bar


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn any error of huggingface_hub into one line with a remedy."""
    from huggingface_hub import constants, errors

    page, cache = f"{constants.ENDPOINT}/{name.repo}", Path(constants.HF_HUB_CACHE)
    try:
        yield
    except PentadError:
        raise
    except errors.GatedRepoError as error:
        remedy = f"visit {page} to ask for access, then set HF_TOKEN to your token"
        raise PentadError(f"{name.repo} is gated: {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{name.repo} has no revision {name.revision!r}: see {page}") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "if it is private, set HF_TOKEN to your token"
        raise BadInput(f"no model {name.repo} at {constants.ENDPOINT}, and no such path here; {remedy}") from error
    except errors.OfflineModeIsEnabled as error:
        remedy = "HF_HUB_OFFLINE is set: pull it once while online"
        raise PentadError(f"{name} is not in the cache {cache}, and {remedy}") from error
    except Exception as error:  # the HTTP library's errors pass through huggingface_hub
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise storage_error(error, cache, "HF_HOME") from error
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        remedy = "it is neither in the cache nor a path here; check the connection"
        raise PentadError(f"could not pull {name} from {constants.ENDPOINT} ({reason}), and {remedy}") from error
