"""The runner of Segment Anything: an image is embedded once, and each prompt gives masks.

Legend: P prompts, M masks, S patches a side, D channels of an image's map, U = 4 * S.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad import build, weights
from pentad.errors import BadInput
from pentad.models.vision.sam.prompt_encoder import Prompts
from pentad.models.vision.sam.sam import Sam
from pentad.vision.masks import RLE, decode, rle_box
from pentad.vision.preprocess import resize_pillow
from pentad.vision.prompts import Fitted, Numbers, Request, read_prompts
from pentad.vision.runner import VisionModel, pixels_of
from pentad.vision.thresholding import Thresholder
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.safetensors import read_safetensors

if TYPE_CHECKING:
    from pentad.vision.clip import Clip
    from pentad.vision.runner import Image
    from pentad.weights.cache import Progress

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CACHED = 16  # maps of images; one of a published model has 4 MiB
PROMPTS_AT_ONCE = 4  # so that their activations stay in the third-level cache
CLIP_FOLDER = "clip"
"""The folder in a model's folder with the CLIP that its words go through."""


def fit_image(image_3HW: Tensor, pixels: int) -> Tensor:
    """A uint8 image whose longer side fills the network's input, normalized; not yet padded to a square."""
    inner = Fitted.of(image_3HW.shape[1], image_3HW.shape[2], pixels).inner
    resized_3HW = image_3HW if image_3HW.shape[1:] == inner else resize_pillow(image_3HW, inner)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (resized_3HW.float() - mean) / std


def fit_objects(image_3HW: Tensor, boxes_N4: Tensor, pixels: int, _: int) -> tuple[Tensor, Tensor]:
    """`fit_image` of a square input, and boxes of the image in its pixels."""
    fitted = Fitted.of(image_3HW.shape[1], image_3HW.shape[2], pixels)
    return fit_image(image_3HW, pixels), fitted.to_input(boxes_N4.view(-1, 2, 2)).view(-1, 4)


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask of an image.

    Attributes:
        rle: COCO's run-length code.
        box: x0, y0, x1, y1 around the mask, in pixels; zeros for an empty one.
        predicted_iou: the network's guess of the mask's IoU with the right one.
        stability_score: IoU of the masks at thresholds above and below.
        prompt: what asked for it: points and labels, box, text.
        logits_UU: in the network's square input; a prompt for a better mask. None in `Segmenter.everything`.
    """

    rle: RLE
    box: tuple[float, float, float, float]
    predicted_iou: float
    stability_score: float
    prompt: dict[str, Any]
    logits_UU: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def mask(self) -> Tensor:
        """bool [H, W]."""
        return decode(self.rle)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        names = "rle", "box", "predicted_iou", "stability_score", "prompt"
        return {name: getattr(self, name) for name in names}


class Segmenter(VisionModel):
    """A promptable segmenter that is ready to run; `pentad.load` makes one.

    >>> import pentad
    >>> sam = pentad.load("sam_vit_b_01ec64.pth")
    >>> photo = sam.image("dog.jpg")
    >>> [mask] = photo.masks(points=[(320, 200)])
    """

    task: ClassVar[str] = "segment"

    def __init__(self, name: str, network: nn.Module, checkpoint: Checkpoint, *, load_seconds: float = 0.0) -> None:
        super().__init__(name, network, checkpoint, load_seconds=load_seconds)
        assert isinstance(network, Sam)
        self.sam = network
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, image: Image, *, cached: bool = True) -> EmbeddedImage:
        """Embed an image. The maps of the last images are cached by their pixels.

        Args:
            image: a path, a file's content, a picture of Pillow's, or uint8 [3, H, W].
            cached: False to leave the cache alone.

        Raises:
            BadInput: it is no image, or damaged.
        """
        pixels = pixels_of(image)
        height, width = pixels.shape[1:]
        if not cached:
            return EmbeddedImage(self, height, width, self.embed(pixels))
        key = hashlib.sha256(f"{height} {width} ".encode() + pixels.permute(1, 2, 0).contiguous().numpy().data).digest()
        with self._lock:
            map_DSS = self._cache.get(key)
        if map_DSS is None:
            map_DSS = self.embed(pixels)
        with self._lock:
            self._cache[key] = map_DSS
            self._cache.move_to_end(key)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return EmbeddedImage(self, height, width, map_DSS)

    def everything(self, image: Image, *, progress: Progress | None = None, **settings: Any) -> list[Mask]:
        """Segment everything in an image.

        Args:
            image: see `image`.
            progress: counts the points that have been asked for.
            settings: fields of `pentad.vision.automatic.Everything`.

        Returns:
            Masks by falling predicted IoU; with crops those of the smallest ones first.

        Raises:
            BadInput: it is no image, or a setting is unknown or out of range.
        """
        from pentad.vision.automatic import Everything, segment_everything

        known = Everything.__dataclass_fields__
        if wrong := next((name for name in settings if name not in known), None):
            raise BadInput(f"unknown setting {wrong!r}; known settings: {', '.join(known)}")
        return segment_everything(self, pixels_of(image), Everything(**settings), progress)

    @torch.inference_mode()
    def embed(self, image_3HW: Tensor) -> Tensor:
        """The map [D, S, S] of uint8 pixels."""
        pixels = self.sam.config.image_size
        fitted_3HW = fit_image(image_3HW, pixels)
        padded_3HW = F.pad(fitted_3HW, (0, pixels - fitted_3HW.shape[2], 0, pixels - fitted_3HW.shape[1]))
        map_DSS: Tensor = self.sam.image_encoder(padded_3HW[None].to(self.device, self.dtype))[0]
        return map_DSS

    @cached_property
    def clip(self) -> Clip:
        """The CLIP that the network was trained with, loaded when it is first asked for.

        Raises:
            BadInput: the network takes no words, or its CLIP is missing or another one.
        """
        from pentad.vision.clip import Clip

        width, folder = self.sam.config.text_embed_dim, self.checkpoint.path / CLIP_FOLDER
        if width is None:
            raise BadInput(
                f"{self.name} takes no words, as no published Segment Anything does: use points or boxes, or train one"
                " with segment.clip (docs/vision.md)"
            )
        if not folder.is_dir():
            raise BadInput(f"{folder} is not there; expected the CLIP that {self.name} was trained with")
        checkpoint = weights.open(folder)
        network = build.build(checkpoint, device=self.device, dtype=self.dtype)
        clip = Clip(str(folder), network, checkpoint)
        if clip.network.config.projection_dim != width:
            found = clip.network.config.projection_dim
            raise BadInput(f"{folder}: embeddings have {found} numbers; expected {width}, as {self.name} takes")
        return clip

    @property
    def fingerprint(self) -> Tensor:
        """uint8 [32], which tells the maps of this network from another's."""
        norm = self.sam.image_encoder.neck[-1]
        weights = torch.cat([tensor.detach().float().cpu().flatten() for tensor in norm.parameters()])
        return torch.tensor([*hashlib.sha256(weights.numpy().data).digest()], dtype=torch.uint8)

    def open_image(self, path: str | Path) -> EmbeddedImage:
        """An image that `EmbeddedImage.save` wrote.

        Raises:
            BadInput: the file is another one, or of another network.
        """
        entries = read_safetensors(Path(path))
        config = self.sam.config
        expected = (config.output_channels, config.side, config.side)
        if {*entries} != {"map", "size", "network"} or entries["size"].shape != (2,):
            raise BadInput(f"{path} is not an embedded image; expected a file that EmbeddedImage.save wrote")
        tensors: dict[str, Any] = {name: entry.read() for name, entry in entries.items()}
        if not torch.equal(tensors["network"], self.fingerprint) or tensors["map"].shape != expected:
            raise BadInput(f"{path} was embedded by another network; expected one by {self.name}")
        height, width = tensors["size"].tolist()
        return EmbeddedImage(self, height, width, tensors["map"].to(self.device, self.dtype))


class EmbeddedImage:
    """An image that answers prompts.

    Attributes:
        height, width: in pixels.
        map_DSS: what the image encoder made of it.
    """

    def __init__(self, segmenter: Segmenter, height: int, width: int, map_DSS: Tensor) -> None:
        self.segmenter = segmenter
        self.height, self.width = height, width
        self.map_DSS = map_DSS
        self.fitted = Fitted.of(height, width, segmenter.sam.config.image_size)

    def __repr__(self) -> str:
        return f"<EmbeddedImage {self.width} x {self.height} of {self.segmenter!r}>"

    def masks(
        self,
        *,
        points: Numbers | None = None,
        labels: Numbers | None = None,
        boxes: Numbers | None = None,
        mask: Numbers | Mask | None = None,
        text: str | Sequence[str] | None = None,
        multimask: bool | None = None,
    ) -> list[Mask]:
        """Segment what prompts mean. Each prompt may have points, a box, a mask and a text.

        Args:
            points: x, y of one prompt's points, [K, 2]; or of several prompts, [P, K, 2].
            labels: for each point 1 (in the object, the default) or 0 (outside).
            boxes: x0, y0, x1, y1 of one prompt, or of several, [P, 4].
            mask: a mask to improve: a former answer, its logits, or bool [height, width]; or [P, ...].
            text: words, such as "the dog", of one prompt, or a list with one text a prompt, for a network trained
                with a CLIP. One text gives one mask, also where several objects fit it.
            multimask: True for three masks a prompt (as a rule a whole, a part and a smaller part), False for one. By
                default one: for a single point, or a text alone, the best of the three.

        Returns:
            The masks of the first prompt, by falling predicted IoU, then those of the next one.

        Raises:
            BadInput: prompts are missing, malformed or outside of the image; or see `Segmenter.clip`.
        """
        given = mask.logits_UU if isinstance(mask, Mask) else mask
        texts = [text] if isinstance(text, str) else text
        side = 4 * self.segmenter.sam.config.side
        request = read_prompts(points, labels, boxes, given, self.fitted, side, texts)
        if request.texts is not None:
            request = replace(request, texts_PE=self.segmenter.clip.embed_text(request.texts))
        several = request.is_ambiguous if multimask is None else multimask
        found = list[Mask]()
        for start in range(0, request.count, PROMPTS_AT_ONCE):
            chosen = slice(start, start + PROMPTS_AT_ONCE)
            for index, (logits_MUU, iou_M) in enumerate(
                zip(*self.decode(request, chosen, several), strict=True), start
            ):
                order = iou_M.argsort(descending=True, stable=True)[: 1 if multimask is None else None]
                found += (self._mask(logits_MUU[i], float(iou_M[i]), request.describe(index)) for i in order)
        return found

    @torch.inference_mode()
    def decode(self, request: Request, chosen: slice, multimask: bool) -> tuple[Tensor, Tensor]:
        """Logits [P, M, U, U] and predicted IoU [P, M] of some prompts, float32 on the CPU."""
        prompts, device = request.on(self.fitted, chosen), self.segmenter.device
        found = []
        for start in range(0, prompts.count, PROMPTS_AT_ONCE):
            part = slice(start, start + PROMPTS_AT_ONCE)
            some = {name: None if x is None else x[part].to(device) for name, x in vars(prompts).items()}
            found.append(self.segmenter.sam.decode(self.map_DSS, Prompts(**some), multimask=multimask))
        logits, iou = (torch.cat(parts).float().cpu() for parts in zip(*found, strict=True))
        return logits, iou

    @cached_property
    def threshold(self) -> Thresholder:
        """Logits [U, U] -> a mask of the image's size."""
        return Thresholder(self.fitted, 4 * self.segmenter.sam.config.side)

    def _mask(self, logits_UU: Tensor, iou: float, prompt: dict[str, Any]) -> Mask:
        found = self.threshold(logits_UU)
        rle = found.rle
        return Mask(rle, rle_box(rle), iou, found.stability_score, prompt, logits_UU)

    def save(self, path: str | Path) -> None:
        """Write the map to a .safetensors file, for `Segmenter.open_image`."""
        from safetensors.torch import save_file

        size = torch.tensor([self.height, self.width])
        map_DSS = self.map_DSS.detach().cpu().contiguous()
        save_file({"map": map_DSS, "size": size, "network": self.segmenter.fingerprint}, path)
