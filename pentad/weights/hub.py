"""Models of the Hugging Face hub, through huggingface_hub and its own cache.

Which server is asked (HF_ENDPOINT), where the cache is (HF_HOME), who asks (HF_TOKEN) and whether
anybody is asked at all (HF_HUB_OFFLINE) is huggingface_hub's to read. It checks the size of what it
downloads; the SHA-256 is checked here.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pentad.errors import BadInput, PentadError
from pentad.weights.cache import Progress, storage_error, task

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

__all__ = ["CachedRepo", "HubName", "cached_repos", "parse", "pull", "remove"]

# Read by huggingface_hub when it is imported, which the functions below do.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# What a folder may hold beside its weights: configurations, tokenizers, chat templates.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "merges.txt", "vocab.txt")
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "tokenizer.bin")
FOREIGN_WEIGHTS = (".pth", ".pt", ".onnx", ".h5", ".msgpack", ".ckpt", ".npz", ".tflite")

# What both llama.cpp and transformers put into the name of a split file's part.
PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.[a-z]+$)")
NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
    r"(?::(?P<file>[A-Za-z0-9][\w.-]*))?",
    re.ASCII,
)
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
LISTED = 40  # files named in a message, at most


@dataclass(frozen=True)
class HubName:
    """`repo[@revision][:file]`; `file` is a GGUF file's quantization, or its whole name."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class CachedRepo:
    """A repository in Hugging Face's cache that can be opened; `path` is its newest snapshot."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; `sha256` only of those in large-file storage, as weights are."""

    nbytes: int
    sha256: str | None


def parse(name: str) -> HubName:
    """Take `org/name[@revision][:file]` apart. Raises BadInput for what no hub would take."""
    match = NAME.fullmatch(name)
    if match is None or ".." in name or "//" in name or "--" in match["repo"] or len(match["repo"]) > 96:
        raise BadInput(
            f"not the name of a model: {name!r}; a hub name is org/name[@revision][:quantization], "
            "of letters, digits and . _ -"
        )
    return HubName(match["repo"], match["revision"], match["file"])


def pull(name: HubName, progress: Progress) -> Path:
    """The snapshot's folder, or the GGUF file (of a split one the first), downloaded if need be.

    Where the hub doesn't answer, what is cached will do. Raises BadInput for a repository, revision
    or file that isn't there or can't be told from others, PentadError for a gated repository and
    for a download that fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    with _explained(name):
        try:
            commit, files = _list_files(name)
        except RevisionNotFoundError:
            raise
        except Exception:  # offline, unreachable, no longer allowed: each has a class of its own
            if (cached := _find_cached(name)) is not None:
                return cached
            raise
        chosen, entry = _choose(name, list(files))
        missing = {path: files[path] for path in chosen if not _is_cached(name, path, commit)}
        what = f"downloading {name}" if missing else f"looking up {name}"
        total = sum(file.nbytes for file in missing.values()) or None
        with task(progress, what, total):
            folder = Path(
                snapshot_download(
                    name.repo,
                    revision=name.revision,
                    allow_patterns=[glob.escape(path) for path in chosen],
                    tqdm_class=_bar_class(progress),
                )
            )
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
    return sorted(rows, key=lambda row: row.name)


def remove(name: HubName) -> int:
    """Take a repository, or a revision of one, out of Hugging Face's cache; returns bytes freed.

    Raises BadInput when it isn't there, or when `name` asks for one file of it.
    """
    from huggingface_hub import constants

    if name.file is not None:
        raise BadInput(f"cannot remove one file of a repository: remove all of {name.repo}")
    revisions = [
        revision
        for repo in _scan_models()
        if repo.repo_id == name.repo
        for revision in repo.revisions
        if name.revision is None or _is_called(revision, name.revision)
    ]
    if not revisions:
        raise BadInput(f"{name} is not in the cache: nothing to remove")
    try:
        strategy = _scan().delete_revisions(*(revision.commit_hash for revision in revisions))
        strategy.execute()
    except OSError as error:
        raise storage_error(error, Path(constants.HF_HUB_CACHE), "HF_HOME") from error
    if any(path.exists() for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs)):
        raise PentadError(f"could not remove all of {name} from {constants.HF_HUB_CACHE}: check who may write there")
    return strategy.expected_freed_size


def _list_files(name: HubName) -> tuple[str, Mapping[str, RemoteFile]]:
    """The commit that the revision stands for, and its files by path."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name.repo, revision=name.revision or "main", files_metadata=True)
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if not path.is_absolute() and ".." not in path.parts:
            files[file.rfilename] = RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
    return info.sha or "", files


def _choose(name: HubName, files: Sequence[str]) -> tuple[list[str], str | None]:
    """Of a repository's files, those to have, and which of them to open (None: their folder)."""
    top = sorted(path for path in files if "/" not in path)
    safetensors = [path for path in top if path.endswith(".safetensors")]
    # Mistral's repositories hold their weights twice: once more as `consolidated`.
    weights = [path for path in safetensors if not path.startswith("consolidated")] or safetensors
    weights = weights or [path for path in top if path.endswith(".bin") and path not in NOT_WEIGHTS]
    weights = weights or [path for path in top if fnmatch(path, "consolidated.*.pt*")]
    if name.file is None and weights:
        _check_parts(name, weights)
        return [*_side_files(top), *weights], None
    ggufs = _gguf_groups(files)
    if name.file is not None or ggufs:
        parts = _choose_gguf(name, ggufs)
        _check_parts(name, parts)
        return parts, parts[0]
    if {"config.json", "params.json"}.intersection(top) and not any(path.endswith(FOREIGN_WEIGHTS) for path in top):
        return _side_files(top), None
    raise BadInput(
        f"{name} holds no weights that pentad opens (safetensors, .bin, consolidated, GGUF); there is:"
        f" {_listing(top) or 'nothing'}"
    )


def _side_files(files: Sequence[str]) -> list[str]:
    return [path for path in files if any(fnmatch(path, pattern) for pattern in SIDE_FILES)]


def _gguf_groups(files: Sequence[str]) -> dict[str, list[str]]:
    """The GGUF files that are models, the parts of a split one under its path without numbers."""
    groups: dict[str, list[str]] = {}
    for path in sorted(files):
        is_model = not re.search("mmproj|imatrix", path, re.IGNORECASE)
        if path.endswith(".gguf") and is_model:
            groups.setdefault(PART.sub("", path), []).append(path)
    return groups


def _choose_gguf(name: HubName, groups: Mapping[str, list[str]]) -> list[str]:
    """The parts of the one file that `name` means; ":q4_k" is Q4_K, and not Q4_K_M."""
    if name.file is None:
        matching = list(groups)
    else:
        wanted = re.escape(name.file.removesuffix(".gguf"))
        matching = [group for group in groups if re.search(rf"(?:^|[-_./]){wanted}(?=[-./])", group, re.IGNORECASE)]
    if len(matching) == 1:
        return groups[matching[0]]
    there = _listing([Path(group).stem for group in matching or groups])
    if not groups:
        raise BadInput(f"{name.repo} holds no GGUF file: leave out `:{name.file}`")
    if not matching:
        raise BadInput(f"{name.repo} holds no GGUF file called {name.file}; there is: {there}")
    raise BadInput(f"{name} may be any of several GGUF files, name one as in {name.repo}:{there}")


def _check_parts(name: HubName, files: Sequence[str]) -> None:
    """Refuse a split file of which parts are missing."""
    groups: dict[str, list[int]] = {}
    for path in files:
        if (part := PART.search(path)) is not None:
            groups.setdefault(PART.sub("", path), []).append(int(part[1]))
    for group, counts in groups.items():
        if len(counts) != counts[0]:
            raise BadInput(f"{name.repo} holds only {len(counts)} of the {counts[0]} parts of {group}")


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _is_cached(name: HubName, path: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name.repo, path, revision=commit), str)


def _find_cached(name: HubName) -> Path | None:
    """What `pull` would return, where the cache holds all of it."""
    for repo in _scan_models():
        for revision in repo.revisions:
            if repo.repo_id == name.repo and _is_called(revision, name.revision or "main"):
                files = [file.file_path.relative_to(revision.snapshot_path).as_posix() for file in revision.files]
                with contextlib.suppress(BadInput):  # what is wanted isn't among the files
                    chosen, entry = _choose(name, files)
                    if any(path.endswith((".safetensors", ".bin", ".gguf")) for path in chosen):
                        return revision.snapshot_path / (entry or "")
    return None


def _is_called(revision: "CachedRevisionInfo", name: str) -> bool:
    return name in revision.refs or revision.commit_hash == name


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
    """Compare a downloaded file with the SHA-256 the hub gives for it; throw a wrong one away."""
    expected = file.sha256
    if expected is None and path.is_symlink():
        # A mirror may leave it out of its listing; the cache calls such files by it all the same.
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
        path.resolve().unlink(missing_ok=True)  # the blob that the snapshot's link points at
        path.unlink(missing_ok=True)
        raise PentadError(
            f"{path.name} of {name} arrived damaged (SHA-256 {digest.hexdigest()}, not "
            f"{expected}): it was thrown away; pull again"
        )


def _bar_class(progress: Progress) -> type[Any]:
    """A bar for huggingface_hub that draws nothing and tells `progress` of the bytes.

    huggingface_hub may count the same bytes on two bars, as received and as written: what the
    fuller one says is told.
    """
    from huggingface_hub.utils.tqdm import tqdm

    lock, told = threading.Lock(), 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counted = kwargs.get("initial") or 0 if kwargs.get("unit") == "B" else None
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if self.counted is not None:
                with lock:
                    self.counted += int(n or 0)
                    if self.counted > told:
                        progress.advance(self.counted - told)
                        told = self.counted

    return Bar


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repo}"
    cache = Path(constants.HF_HUB_CACHE)
    try:
        yield
    except PentadError:
        raise
    except errors.GatedRepoError as error:
        raise PentadError(
            f"{name.repo} is gated: visit {page} to ask for access, "
            "then set HF_TOKEN (which is read) to a token of yours"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{name.repo} has no revision {name.revision!r}: see {page}") from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"no model {name.repo} at {constants.ENDPOINT}, and no such path here; "
            "if it is private, set HF_TOKEN (which is read) to a token of yours"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise PentadError(
            f"{name} is not in the cache {cache}, and HF_HUB_OFFLINE is set: pull it once while online"
        ) from error
    except Exception as error:  # the HTTP library's own errors pass through huggingface_hub
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise storage_error(error, cache, "HF_HOME") from error
        reason = next(iter(str(error).splitlines()), "")
        raise PentadError(
            f"could not pull {name} from {constants.ENDPOINT} ({type(error).__name__}: {reason}), "
            "and it is neither in the cache nor a path here; check the connection"
        ) from error
