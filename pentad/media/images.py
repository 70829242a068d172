"""Image files <-> tensors: uint8 [3, H, W], red, green, blue.

Pixels lie in memory as in the file, channels last: a batch of these tensors has torch's channels_last layout.
"""

from io import BytesIO
from os.path import isdir, isfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput

try:
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise BadInput("images need Pillow; install it: pip install 'pentad[vision]'") from error

__all__ = ["MAX_PIXELS", "from_pil", "image_size", "read_image", "to_pil", "write_image"]

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs

# Pillow also opens formats that start other programs (EPS) or that nobody has tested against hostile files.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
_EXPECTED = "expected a JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF or PNM image"
_ORIENTATION = 0x0112  # EXIF
_TURNED = range(5, 9)  # the orientations that swap width and height


def read_image(source: str | Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image as it is meant to be seen: turned by its EXIF orientation, and transparent pixels on white.

    Animated images give their first frame. The format is recognized by content, whatever the file is called.

    Args:
        source: a path, or a file's content.
        name: what error messages call it; the path by default.
        max_pixels: an image with more is refused before it is decoded.

    Returns:
        uint8 [3, H, W], red, green, blue. 16-bit gray levels are divided by 256.

    Raises:
        BadInput: there is no such file, or it is no image, damaged, empty or too large.
    """
    name = name or _name(source)
    with _open(source, name, max_pixels) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            return from_pil(upright, name=name)
        except BadInput:
            raise
        except Exception as error:  # decoders raise nearly anything for hostile files
            raise BadInput(f"{name} is damaged: {_first_line(error)}") from error


def image_size(source: str | Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The height and width that `read_image` would give, from the file's header alone."""
    with _open(source, name or _name(source), max_pixels) as image:
        return image.size if _orientation(image) in _TURNED else (image.height, image.width)


def write_image(path: str | Path, image_3HW: Tensor) -> None:
    """Write uint8 [3, H, W] to a file, whose format its name tells (.png, .jpg, .webp …).

    Raises:
        BadInput: the name has no known suffix.
    """
    path = Path(path)
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in _FORMATS:
        raise BadInput(f"{path} has no suffix of an image; expected .png, .jpg or .webp")
    to_pil(image_3HW).save(path, quality=92)


def from_pil(image: Image.Image, *, name: str = "the image") -> Tensor:
    """Convert a picture of Pillow's in any 8- or 16-bit mode to uint8 [3, H, W]."""
    if image.mode.startswith("I;16"):
        gray_HW = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(gray_HW.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadInput(f"{name} has 32-bit pixels (mode {image.mode}); expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels_HW3 = np.array(image.convert("RGB"))  # a copy, which torch may write to
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1)


def to_pil(image_3HW: Tensor) -> Image.Image:
    """Convert uint8 [3, H, W] to a picture of Pillow's."""
    return Image.fromarray(image_3HW.permute(1, 2, 0).contiguous().numpy())


def _name(source: str | Path | bytes) -> str:
    return "the image" if isinstance(source, bytes) else str(source)


def _open(source: str | Path | bytes, name: str, max_pixels: int) -> Image.Image:
    """Open an image without decoding it, and check its size."""
    if not isinstance(source, bytes) and not isfile(source):
        raise BadInput(f"{name} is {'a folder' if isdir(source) else 'not there'}; expected an image file")
    Image.init()
    try:
        image = Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=[f for f in _FORMATS if f in Image.OPEN]
        )
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{name} is too large: {_first_line(error).partition(',')[0]}") from error
    except PermissionError as error:
        raise BadInput(f"{name} can't be read: {error.strerror}") from error
    except Exception as error:
        start = source[:12] if isinstance(source, bytes) else _start(Path(source))
        raise BadInput(f"{name} is {_what(start)}; {_EXPECTED}") from error
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        image.close()
        raise BadInput(f"{name} has {width} x {height} pixels; expected 1 to {max_pixels:,}")
    return image


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(12)


def _what(start: bytes) -> str:
    if not start:
        return "empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC image, which Pillow can't read"
    if start[4:8] == b"ftyp" or start[:4] in (b"\x1a\x45\xdf\xa3", b"RIFF"):
        return "a video or a format that isn't read"
    return "not an image, or its header is damaged"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data says nothing about the pixels
        return 1


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
