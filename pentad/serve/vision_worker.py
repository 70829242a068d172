"""The worker of a vision model: it embeds an image once, and answers many prompts for it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pentad import build
from pentad.errors import BadInput, PentadError
from pentad.loading import load
from pentad.memory import keep_freed_memory
from pentad.models import family_of
from pentad.serve.budget import Size
from pentad.serve.pipe import Pipe
from pentad.vision.runner import VisionModel
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pentad.vision.segmenter import EmbeddedImage, Mask

WORKING_BYTES = 1 << 30  # an image that is decoded, and a network's activations
MAX_PIXELS = 50_000_000
MAX_IMAGES = 16
MAX_MASKS = 256  # logits of former answers, 256 KiB each
PREFIX, MASK_PREFIX = "img-", "mask-"
T = TypeVar("T")


class Unknown(BadInput):
    """An id that the worker has never given, or has forgotten."""


@dataclass
class Photo:
    """An image that a client has sent.

    Attributes:
        data: the file's content.
        embedded: what a segmenter made of it.
    """

    data: bytes
    embedded: EmbeddedImage | None = None


class Recent(OrderedDict[str, T]):
    """The values that were used last, by id.

    Args:
        size: how many are kept.
        what: names one in error messages.
        remedy: what to do if an id is unknown.
    """

    def __init__(self, size: int, what: str, remedy: str) -> None:
        super().__init__()
        self._size, self._what, self._remedy = size, what, remedy

    def add(self, name: str, value: T) -> T:
        """Keep a value, and forget the one that was used least recently."""
        self[name] = value
        self.move_to_end(name)
        if len(self) > self._size:
            self.popitem(last=False)
        return value

    def recall(self, name: str) -> T:
        """A value.

        Raises:
            Unknown: the id was never given, or is forgotten.
        """
        if name not in self:
            raise Unknown(f"{self._what} {name[:60]!r} is not known (any more); {self._remedy}")
        self.move_to_end(name)
        return self[name]


class Cancelled(Exception):
    """The client of the request that runs has gone."""


class VisionWorker:
    """Runs the requests of the front process, one after the other; short ones pass those for everything.

    A request is a line such as ``{"id": 7, "image": "img-…", "points": [[9, 9]]}``, with the fields of the HTTP
    request. ``{"cancel": 7}`` ends it.

    Args:
        model: the model.
        pipe: to the front process.
    """

    def __init__(self, model: VisionModel, pipe: Pipe) -> None:
        self._model: Any = model
        self._pipe = pipe
        self._waiting: dict[int, dict[str, Any]] = {}
        self._images = Recent[Photo](MAX_IMAGES, "image", "upload the image again")
        self._masks = Recent[tuple[str, Tensor]](MAX_MASKS, "mask", "ask without it, or send the mask's RLE")
        self._answers: dict[str, Callable[..., dict[str, Any]]] = {
            "segment": self._segment,
            "detect": self._detect,
            "classify": self._classify,
            "embed": self._classify,
        }

    def run(self) -> None:
        """Serve until the front process closes its end."""
        self._pipe.send({"events": [], "open": 0})
        while self._read(None):
            while self._waiting:
                self._serve(next(iter(self._waiting)))
                if not self._read(0):
                    return

    def _serve(self, number: int) -> None:
        """Run a request that waits, and send its event."""
        event = self._run(number, **self._waiting[number])
        self._waiting.pop(number, None)
        self._pipe.send({"events": [{"id": number, **event}], "open": len(self._waiting)})

    def _read(self, seconds: float | None) -> bool:
        """Take what the front process has sent; False at the end."""
        lines = self._pipe.receive(seconds)
        for line in lines or ():
            message = json.loads(line)
            if "cancel" in message:
                self._waiting.pop(message["cancel"], None)
            else:
                self._waiting[message.pop("id")] = message
        return lines is not None

    def _run(self, number: int, **request: Any) -> dict[str, Any]:
        try:
            return {"finish": "stop", "result": self._answers[self._model.task](number, **request)}
        except Cancelled:
            return {"finish": "stop"}
        except Exception as error:
            if not isinstance(error, PentadError):  # such as memory that ran out
                return {"finish": "error", "message": f"{type(error).__name__}: {error}"}
            status = 404 if isinstance(error, Unknown) else 400 if isinstance(error, BadInput) else 500
            return {"finish": "error", "message": str(error), "status": status}

    def _photo(self, image: str) -> tuple[str, Photo]:
        """An image by its id, or one that is new."""
        if image.startswith(PREFIX):
            return image, self._images.recall(image)
        data = _decoded(image)
        name = PREFIX + hashlib.sha256(data).hexdigest()[:32]
        return name, self._images.get(name) or Photo(data)

    def _segment(
        self, number: int, image: str, *, mask: Any = None, everything: Any = None, **prompts: Any
    ) -> dict[str, Any]:
        started = time.perf_counter()
        name, photo = self._photo(image)
        if photo.embedded is None:
            photo.embedded = self._model.image(_pixels(photo.data))
        embedded = photo.embedded
        self._images.add(name, photo)
        ready = time.perf_counter()
        found: list[Mask] = []
        if everything:
            settings = {"points_per_batch": 1} | (everything if isinstance(everything, dict) else {})
            found = self._model.everything(_pixels(photo.data), progress=_Watched(self, number), **settings)
        elif mask is not None or any(prompts.get(field) is not None for field in ("points", "labels", "boxes", "text")):
            found = embedded.masks(**prompts, mask=self._rough(mask, name))
        masks = []
        for one in found:
            identity = {}
            if one.logits_UU is not None:
                identity = {"id": MASK_PREFIX + secrets.token_hex(8)}
                self._masks.add(identity["id"], (name, one.logits_UU))
            masks.append(identity | one.to_json())
        seconds = {"embedding": ready - started, "masks": time.perf_counter() - ready}
        size = {"width": embedded.width, "height": embedded.height}
        return {"image": name, **size, "masks": masks, "seconds": seconds}

    def _rough(self, mask: Any, image: str) -> Tensor | None:
        """The mask of a request: the logits of a former answer, or what an RLE says."""
        if not isinstance(mask, str):
            from pentad.vision.masks import decode

            return None if mask is None else decode(mask)
        its_image, logits_UU = self._masks.recall(mask)
        if its_image != image:
            raise BadInput(f"the mask {mask!r} is of another image")
        return logits_UU

    def _detect(self, number: int, image: str, **options: Any) -> dict[str, Any]:
        name, photo = self._photo(image)
        [found] = self._model.detect(_pixels(photo.data), **options)
        self._images.add(name, photo)
        return {**found.to_json(), "image": name}

    def _classify(self, number: int, image: str, labels: list[str] | None = None, **options: Any) -> dict[str, Any]:
        if (labels is None) == (self._model.task == "embed"):
            what = "a CLIP, which has no classes of its own" if labels is None else "no CLIP: it has its own classes"
            raise BadInput(f"{self._model.name} is {what}; expected labels for a CLIP only")
        name, photo = self._photo(image)
        found = self._model.classify(_pixels(photo.data), **({} if labels is None else {"labels": labels}), **options)
        self._images.add(name, photo)
        return {"image": name, "labels": [asdict(one) for one in found]}

    def check(self, number: int) -> None:
        """Raise Cancelled if the client of a long request has gone; serve the short ones that have come meanwhile."""
        if not self._read(0) or number not in self._waiting:
            raise Cancelled
        for other in [other for other, request in self._waiting.items() if not request.get("everything")]:
            self._serve(other)


class _Watched(Progress):
    """Ends work whose client has gone, and lets clicks through."""

    def __init__(self, worker: VisionWorker, number: int) -> None:
        self._worker, self._number = worker, number

    def advance(self, n: int) -> None:
        self._worker.check(self._number)


def _decoded(image: str) -> bytes:
    """The content of a file from base64, or from a data URL."""
    if image.startswith(("http:", "https:", "file:", "ftp:")):
        raise BadInput("image is a URL, and the server fetches none; expected the file as a data URL, or its id")
    encoded = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"image is neither base64, a data URL nor an id: {error}") from None


def _pixels(data: bytes) -> Tensor:
    from pentad.media.images import read_image

    return read_image(data, max_pixels=MAX_PIXELS)


def measure(checkpoint: Checkpoint, dtype: str | None) -> Size:
    """What a vision model needs, by its headers."""
    network = build.meta_network(checkpoint)
    chosen = torch.float32 if dtype is None else build.dtype_named(dtype)
    return Size(build.held_bytes(checkpoint, network, chosen), WORKING_BYTES, 0)


def start(checkpoint: Checkpoint, options: dict[str, Any], pipe: Pipe) -> VisionWorker:
    """Load a vision model, and tell the front process what it must know about it."""
    keep_freed_memory()
    model = load(checkpoint.path, dtype=options["dtype"], threads=options["threads"], device=options.get("device"))
    assert isinstance(model, VisionModel)
    parameters = (*model.network.parameters(), *model.network.buffers())
    ready: dict[str, Any] = {
        "task": family_of(checkpoint).task,
        "backend": f"as plain torch, {torch.get_num_threads()} threads",
        "weights_bytes": sum(tensor.nbytes for tensor in parameters),
    }
    if getattr(model.network.config, "text_embed_dim", None) is not None:
        ready["words"] = True
    pipe.send(ready)
    return VisionWorker(model, pipe)
