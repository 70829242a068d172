"""Files of a public GitHub repository, at a commit."""

import contextlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pentad.errors import PentadError
from pentad.weights.cache import Progress, task
from pentad.weights.published import CHUNK, PublishedFile

SERVER = "https://raw.githubusercontent.com"
TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Repository:
    """Files of a repository.

    Attributes:
        name: owner/name.
        commit: the commit's hash.
        files: the files that pentad takes.
    """

    name: str
    commit: str
    files: tuple[PublishedFile, ...]

    @property
    def download_nbytes(self) -> int:
        """Bytes on the disk while they are fetched."""
        return sum(file.nbytes for file in self.files)

    def __str__(self) -> str:
        return f"the repository {self.name}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Download the files; PentadError if the server doesn't answer, or has no such file."""
        with task(progress, f"downloading from {self.name}", self.download_nbytes):
            for file in self.files:
                self._download(file, folder / file.name, progress)

    def _download(self, file: PublishedFile, target: Path, progress: Progress) -> None:
        url, left = f"{SERVER}/{self.name}/{self.commit}/{file.path}", file.nbytes
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, target.open("wb") as out:
                while left >= 0 and (chunk := response.read(min(CHUNK, left + 1))):
                    out.write(chunk)
                    left -= len(chunk)
                    progress.advance(len(chunk))
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            reason = getattr(error, "reason", None) or error
            raise PentadError(f"could not download {file.name} from {url}: {reason}; check the connection") from None

    @contextlib.contextmanager
    def open(self, folder: Path, file: PublishedFile) -> Iterator[IO[bytes]]:
        """A downloaded file as a stream."""
        with (folder / file.name).open("rb") as stream:
            yield stream
