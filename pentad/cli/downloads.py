"""Files from the web, for commands that were given --allow-url."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pentad.errors import BadInput, PentadError

MAX_BYTES = 200_000_000
TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20


def is_url(name: str) -> bool:
    """True for an http(s):// URL."""
    return name.lower().startswith(("http://", "https://"))


def download(url: str, folder: Path) -> Path:
    """Download a URL into a folder; the file has the URL's last name.

    Raises:
        BadInput: the file is larger than `MAX_BYTES`, or the server has none.
        PentadError: the server doesn't answer.
    """
    name = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(url).path)).name)[-100:].lstrip(".") or "image"
    path, size = folder / name, 0
    request = urllib.request.Request(url, headers={"User-Agent": "pentad"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, path.open("wb") as out:
            while chunk := response.read(_CHUNK):
                size += len(chunk)
                if size > MAX_BYTES:
                    raise BadInput(f"{url[:200]} has more than {MAX_BYTES:,} bytes, the limit for URLs")
                out.write(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        raise BadInput(f"{url[:200]}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise PentadError(f"{url[:200]} could not be downloaded: {reason}") from error
    return path
