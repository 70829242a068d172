"""``--view``: a page where a person segments, for one image or for those of a stage of annotation."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.recipes.annotation_folder import AnnotationFolder
    from pentad.serve.loaded import LoadedModel
    from pentad.serve.models import Model
    from pentad.serve.page import Shown


def view_image(
    image: str, name: str, out: Path | None, loading: o.VisionLoading, *, port: int, browser: bool, as_json: bool
) -> None:
    """Serve one image and the page until Ctrl-C."""
    from pentad.media.images import image_size
    from pentad.vision.annotations import read_masks

    path = Path(image)
    height, width = image_size(path)
    file = (path.parent if out is None else out) / f"{path.stem}-coco.json"
    masks = read_masks(file, height, width) if file.exists() else []

    def shown(model: str) -> Shown:
        from pentad.serve.page import View

        return View(path, width, height, model, file, masks)

    serve_page(name, shown, path.name, loading, port=port, browser=browser, as_json=as_json)


def view_stage(
    written: AnnotationFolder,
    images: Sequence[Path],
    name: str,
    loading: o.VisionLoading,
    *,
    port: int,
    browser: bool,
    as_json: bool,
) -> None:
    """Serve images one after the other, until all are done or Ctrl-C."""

    def shown(model: str) -> Shown:
        from pentad.serve.annotating import Stage

        return Stage(written, images, model, lambda: os.kill(os.getpid(), signal.SIGINT))

    left = f"{len(written.left(images))} of {len(images)} images"
    serve_page(name, shown, left, loading, port=port, browser=browser, as_json=as_json)


def serve_page(
    name: str,
    make_view: Callable[[str], Shown],
    what: str,
    loading: o.VisionLoading,
    *,
    port: int,
    browser: bool,
    as_json: bool,
) -> None:
    """Serve the page until Ctrl-C, and open a browser if there is one.

    Args:
        name: the model, as the user calls it.
        make_view: what the page shows, by the model's name in the API.
        what: that, for the user.
        loading: how the model is loaded.
        port, browser, as_json: options of the command.
    """
    from pentad.cli.serving import available, named

    try:
        from pentad.serve.app import make_app
        from pentad.serve.metrics import Metrics
        from pentad.serve.models import Model, Models
        from pentad.serve.server import listen, serve
    except ModuleNotFoundError as error:
        raise BadInput(f"--view needs {error.name}; install it: pip install 'pentad[serve]'") from error
    from pentad.models.family import TASKS
    from pentad.weights import registry

    shown, source = named(name)
    located = registry.locate(source, progress=output.progress())
    metrics, key = Metrics(), secrets.token_urlsafe(16)
    options = {"dtype": loading.dtype, "threads": loading.threads, "device": loading.device, "quantize": None}
    model = Model(shown, located, options, max_queue=64, metrics=metrics)
    models, view = Models([model], available(), lambda: None), make_view(shown)
    app = make_app(models, metrics, host="127.0.0.1", keys=[key.encode()], view=view)
    listening = listen("127.0.0.1", port)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/#{key}"

    def ready(_: Model, loaded: LoadedModel) -> None:
        if loaded.task != "segment":
            raise BadInput(f"{name} is {TASKS[loaded.task]}")
        if as_json:
            output.write_json({"url": url, "model": shown, "file": str(view.file)})
        else:
            output.note(f"pentad: {what}: masks are saved to {view.file}; Ctrl-C ends; the page is {url}")
        if browser and _has_browser():
            import webbrowser

            webbrowser.open(url)

    with listening:
        serve(models, app, listening, ready)


def _has_browser() -> bool:
    """False on a machine without a screen, where Python would start a browser for terminals."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
