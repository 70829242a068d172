"""``pentad segment --view``: the page where a click segments."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.serve.loaded import LoadedModel
    from pentad.serve.models import Model

SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp")


def view(
    image: str, name: str, out: Path | None, loading: o.VisionLoading, *, port: int, browser: bool, as_json: bool
) -> None:
    """Serve one image and the page until Ctrl-C, and open a browser if there is one."""
    from pentad.cli.serving import available, named

    try:
        from pentad.serve.app import make_app
        from pentad.serve.metrics import Metrics
        from pentad.serve.models import Model, Models
        from pentad.serve.page import View
        from pentad.serve.server import listen, serve
    except ModuleNotFoundError as error:
        raise BadInput(f"--view needs {error.name}; install it: pip install 'pentad[serve]'") from error
    from pentad.media.images import image_size
    from pentad.models.family import TASKS
    from pentad.vision.annotations import read_masks
    from pentad.weights import registry

    path = Path(image)
    height, width = image_size(path)
    file = (path.parent if out is None else out) / f"{path.stem}-coco.json"
    masks = read_masks(file, height, width) if file.exists() else []
    shown, source = named(name)
    located = registry.locate(source, progress=output.progress())
    metrics, key = Metrics(), secrets.token_urlsafe(16)
    options = {"dtype": loading.dtype, "threads": loading.threads, "device": loading.device, "quantize": None}
    model = Model(shown, located, options, max_queue=64, metrics=metrics)
    models = Models([model], available(), lambda: None)
    page = View(path.name, _content(path), width, height, shown, file, masks)
    app = make_app(models, metrics, host="127.0.0.1", keys=[key.encode()], view=page)
    listening = listen("127.0.0.1", port)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/#{key}"

    def ready(_: Model, loaded: LoadedModel) -> None:
        if loaded.task != "segment":
            raise BadInput(f"{name} is {TASKS[loaded.task]}")
        if as_json:
            output.write_json({"url": url, "model": shown, "file": str(file)})
        else:
            output.note(f"pentad: {path.name} is at {url}; masks are saved to {file}; Ctrl-C ends")
        if browser and _has_browser():
            import webbrowser

            webbrowser.open(url)

    with listening:
        serve(models, app, listening, ready)


def _has_browser() -> bool:
    """False on a machine without a screen, where Python would start a browser for terminals."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _content(path: Path) -> bytes:
    """The file, or a PNG of it if browsers can't show its format."""
    if path.suffix.lower() in SHOWN_BY_BROWSERS:
        return path.read_bytes()
    from io import BytesIO

    from pentad.media.images import read_image, to_pil

    content = BytesIO()
    to_pil(read_image(path)).save(content, "PNG")
    return content.getvalue()
