"""Reading and writing image files."""

import io
import runpy
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pentad
from pentad import BadInput
from pentad.media.images import image_size, read_image, write_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colors(height: int = 6, width: int = 9) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_pixels_are_red_green_blue_in_rows(kind: str, tmp_path: Path) -> None:
    image = colors()
    (tmp_path / "picture").write_bytes(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    pixels = read_image(tmp_path / "picture")
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    assert image_size(tmp_path / "picture") == (6, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture(orientation: int) -> None:
    """The corners' colors are where a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = colors()
    data = encoded(image, exif=exif)
    pixels = np.asarray(image)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    assert np.array_equal(read_image(data).permute(1, 2, 0).numpy(), upright)
    assert image_size(data) == upright.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    gray = Image.new("L", (4, 3), 255)
    data = encoded(gray.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    assert read_image(data).shape == (3, 3, 4)
    assert read_image(data).float().mean() == 255


def test_a_cmyk_jpeg_has_its_colors() -> None:
    data = encoded(Image.new("RGB", (16, 16), (0, 255, 0)).convert("CMYK"), "JPEG")
    assert read_image(data)[:, 8, 8].tolist() == pytest.approx([0, 255, 0], abs=12)


def test_16_bit_gray_levels_keep_their_high_bytes() -> None:
    levels = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    assert read_image(encoded(Image.fromarray(levels)))[0].tolist() == [[0, 0, 1, 255]]


def test_transparent_pixels_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert read_image(encoded(image))[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255]]
    indexed = image.convert("P")
    indexed.info["transparency"] = indexed.getpixel((1, 0))
    assert read_image(encoded(indexed))[:, 0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("white", "black")]
    pixels = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert pixels.float().mean() == 255


def png(width: int, height: int) -> bytes:
    """A PNG's header that claims a size, and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video"),
        (encoded(colors(64, 64))[:900], "is damaged"),
        (encoded(colors(64, 64), "JPEG")[:900], "is damaged"),
        (encoded(colors(64, 64), "WEBP")[:300], "x.jpg"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "32-bit pixels"),
        (png(0, 5), "not an image"),
        (png(30_000, 3_000), "too large"),
        (png(60_000, 60_000), "too large"),
    ],
)
def test_bad_files_are_refused_in_one_line_with_their_name(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=said) as error:
        read_image(path)
    assert "x.jpg" in str(error.value)
    assert "\n" not in str(error.value)


def test_size_is_checked_before_decoding(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="64 x 32 pixels"):
        read_image(encoded(colors(32, 64)), max_pixels=1000)
    with pytest.raises(BadInput, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(BadInput, match="not there"):
        image_size(tmp_path / "missing.png")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    pixels = read_image(encoded(colors()))
    write_image(tmp_path / "x.png", pixels)
    assert torch.equal(read_image(tmp_path / "x.png"), pixels)
    write_image(tmp_path / "x.JPG", pixels)
    assert read_image(tmp_path / "x.JPG").shape == pixels.shape
    with pytest.raises(BadInput, match="suffix"):
        write_image(tmp_path / "x.txt", pixels)


@pytest.mark.parametrize(("module", "package"), [("images", "PIL"), ("video", "av")])
def test_a_missing_package_is_named_with_its_install(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = Path(pentad.__file__).parent / "media" / f"{module}.py"
    with pytest.raises(BadInput, match=r"pip install 'pentad\[vision\]'"):
        runpy.run_path(str(path))
