"""The runner of CLIP: embeddings of images and texts, and classes that the caller names.

Legend: B images [3, H, W], T texts of N tokens at most, E width of the embeddings, V classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad import text
from pentad.errors import BadInput
from pentad.models.vision.clip import CLIP
from pentad.nn.batch import pack
from pentad.vision.classifier import Label, batched, most_probable, preprocess_image, read_preprocessing
from pentad.vision.runner import VisionModel
from pentad.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pentad.vision.runner import Image

TEMPLATE = "a photo of a {}."
TEXTS = 256  # embedded at a time


def text_ids(tokenizer: text.Tokenizer, one: str, most: int, *, truncate: bool) -> list[int]:
    """The ids of a text with its start and end tokens; one that is too long is cut, or raises BadInput."""
    ids = [*tokenizer.encode(one, bos=tokenizer.adds_bos), *tokenizer.closing]
    if len(ids) <= most:
        return ids
    if not truncate:
        long = f"the text {one[:40]!r} has {len(ids)} tokens with its start and end"
        raise BadInput(f"{long}; expected at most {most}, or truncate=True to cut it")
    return [*ids[: most - 1], tokenizer.closing[-1]]


class Clip(VisionModel):
    """An encoder of images and texts; `pentad.load` makes one.

    Attributes:
        preprocessing: how images are resized and normalized.
        context_length: how many tokens a text has at most, with its start and end tokens.
    """

    task: ClassVar[str] = "embed"

    def __init__(self, name: str, network: nn.Module, checkpoint: Checkpoint, *, load_seconds: float = 0.0) -> None:
        super().__init__(name, network, checkpoint, load_seconds=load_seconds)
        assert isinstance(network, CLIP)
        self.network: CLIP = network
        config = network.config
        self.preprocessing = read_preprocessing(checkpoint, config.preprocessing)
        self.context_length = 0 if config.text_config is None else config.text_config.max_position_embeddings
        self._tokenizer: text.Tokenizer | BadInput | None = None
        if config.text_config is not None:
            try:
                self._tokenizer = text.load(checkpoint, vocab_size=config.text_config.vocab_size)
            except BadInput as error:
                self._tokenizer = error  # raised when a text comes: images need none
        self._classes: tuple[object, Tensor] = None, torch.empty(0)

    @property
    def tokenizer(self) -> text.Tokenizer:
        """The tokenizer.

        Raises:
            BadInput: the checkpoint has none, it is broken, or isn't CLIP's.
        """
        if isinstance(self._tokenizer, BadInput):
            raise self._tokenizer
        if self._tokenizer is None:
            files = "tokenizer.json, vocab.json with merges.txt, or bpe_simple_vocab_16e6.txt.gz"
            raise BadInput(f"{self.name} has no tokenizer; expected {files} beside the weights")
        if not self._tokenizer.closing:
            raise BadInput(f"{self.name}: its tokenizer ends a text with no token; expected CLIP's")
        return self._tokenizer

    def tokenize(self, texts: Sequence[str], *, truncate: bool = False) -> Tensor:
        """The ids int64 [T, `context_length`] of texts: start token, text, end token, padding.

        Args:
            texts: any texts.
            truncate: cut a text that is too long; its last token is the end token. By default it is an error.

        Raises:
            BadInput: a text is too long, or is no string; or the model has no tokenizer.
        """
        rows, tokenizer = self._ids(texts, truncate), self.tokenizer
        pad = tokenizer.control.get(tokenizer.special_tokens.get("pad_token", ""), tokenizer.closing[-1])
        rows = [ids + [pad] * (self.context_length - len(ids)) for ids in rows]
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.context_length)

    def _ids(self, texts: Sequence[str], truncate: bool) -> list[list[int]]:
        if isinstance(texts, str):
            raise BadInput(f"texts is {texts[:40]!r}; expected a list of texts")
        self._check("text_config", "text")
        tokenizer = self.tokenizer
        return [text_ids(tokenizer, one, self.context_length, truncate=truncate) for one in texts]

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str], *, truncate: bool = False, normalize: bool = True) -> Tensor:
        """The embedding of each text, float32 [T, E].

        Args:
            texts: any texts.
            truncate: see `tokenize`.
            normalize: of length 1, so that products are cosines; else as the network gives them.

        Raises:
            BadInput: see `tokenize`; or the model has no text encoder.
        """
        rows = self._ids(texts, truncate)
        parts = [self.network.embed_text(*pack(*part, device=self.device)) for part in batched(rows, TEXTS)]
        return self._finished(parts, normalize)

    @torch.inference_mode()
    def embed_images(self, images: Iterable[Image], *, batch_size: int = 8, normalize: bool = True) -> Tensor:
        """The embedding of each image, float32 [B, E].

        Args:
            images: paths, files' contents, uint8 [3, H, W], or pictures of Pillow's.
            batch_size: how many go through the network together.
            normalize: see `embed_text`.

        Raises:
            BadInput: one is no image, or damaged; or the model has no image encoder.
        """
        self._check("vision_config", "image")
        if isinstance(images, str | bytes | Tensor):
            raise BadInput("images is one image; expected a list of images")
        parts = []
        for part in batched(images, batch_size):
            pixels_B3HW = torch.stack([preprocess_image(image, self.preprocessing) for image in part])
            parts.append(self.network.embed_images(pixels_B3HW.to(self.device, self.dtype)))
        return self._finished(parts, normalize)

    def _check(self, field: str, encoder: str) -> None:
        if getattr(self.network.config, field) is None:
            raise BadInput(f"{self.name} has no {encoder} encoder")

    def _finished(self, parts: list[Tensor], normalize: bool) -> Tensor:
        embeddings = torch.cat(parts).float().cpu() if parts else torch.empty(0, 0)
        return F.normalize(embeddings, dim=1) if normalize else embeddings

    def classify(self, image: Image, labels: Sequence[str], *, template: str = TEMPLATE, top_k: int = 5) -> list[Label]:
        """The most probable of the classes that the caller names, the first one first: zero-shot classification.

        Args:
            image: a path, a file's content, uint8 [3, H, W], or a picture of Pillow's.
            labels: the classes; their texts are embedded once for calls with the same classes.
            template: the text of a class, whose label replaces ``{}``.
            top_k: how many classes to return.

        Raises:
            BadInput: it is no image, or damaged; there are no labels, or one is empty or too long; the template has no
                ``{}``; or `top_k` is below 1.
        """
        return next(self.classify_many([image], labels, template=template, top_k=top_k))

    def classify_many(
        self,
        images: Iterable[Image],
        labels: Sequence[str],
        *,
        template: str = TEMPLATE,
        top_k: int = 5,
        batch_size: int = 8,
    ) -> Iterator[list[Label]]:
        """`classify` for each image, `batch_size` of them at a time."""
        texts_VE = self.embed_classes(labels, template=template)
        scale = self.network.logit_scale.weight.float().exp().cpu()
        for part in batched(images, batch_size):
            logits_BV = scale * self.embed_images(part, batch_size=batch_size) @ texts_VE.T
            yield from most_probable(logits_BV, labels, top_k)

    def embed_classes(self, labels: Sequence[str], *, template: str = TEMPLATE) -> Tensor:
        """The embedding of each class's text, float32 [V, E], kept for the next call; see `classify`."""
        if isinstance(labels, str) or not labels or not all(isinstance(one, str) and one.strip() for one in labels):
            raise BadInput(f"labels is {str(labels)[:60]!r}; expected a list of names, none of them empty")
        if "{}" not in template:
            raise BadInput(f"the template is {template!r}; expected {{}} in it, which the label replaces")
        self._check("vision_config", "image")
        key, embeddings_VE = self._classes
        if key != (wanted := (tuple(labels), template)):
            embeddings_VE = self.embed_text([template.replace("{}", label) for label in labels])
            self._classes = wanted, embeddings_VE
        return embeddings_VE
