"""Reading and writing video files."""

import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pentad import BadInput
from pentad.media.video import VideoWriter, read_video, video_facts


def frame(index: int, height: int = 48, width: int = 64) -> Tensor:
    """Orange, with a white block that moves to the right."""
    image = torch.tensor([220, 120, 20], dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    image[:, 8:24, 4 * index : 4 * index + 16] = 255
    return image


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for index in range(9):
            writer.write(frame(index))
    return tmp_path / "clip.mp4"


def difference(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def test_frames_are_what_was_written_with_their_times(clip: Path) -> None:
    frames = list(read_video(clip))
    assert [f.number for f in frames] == list(range(9))
    assert [f.time for f in frames] == pytest.approx([index / 10 for index in range(9)])
    assert all(difference(f.image, frame(f.number)) < 4 for f in frames)
    assert frames[0].image.dtype == torch.uint8
    assert video_facts(clip) == (9, Fraction(10))
    assert [f.number for f in read_video(clip, every=4)] == [0, 4, 8]


def test_frames_keep_their_own_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.5, 0.52]
    with VideoWriter(tmp_path / "x.mp4", 30) as writer:
        for index, time in enumerate(times):
            writer.write(frame(index), time)
    assert [f.time for f in read_video(tmp_path / "x.mp4")] == pytest.approx(times, abs=1e-4)


def test_odd_sides_get_a_repeated_line(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(frame(0, 31, 45))
    [read] = read_video(tmp_path / "x.mp4")
    assert read.image.shape == (3, 32, 46)
    assert difference(read.image[:, :31, :45], frame(0, 31, 45)) < 4
    assert difference(read.image[:, 31, 20:], frame(0, 31, 45)[:, 30, :1]) < 8


def test_a_phones_video_is_turned_upright(clip: Path) -> None:
    """The matrix of the track's header: a quarter to the right."""
    unit = 1 << 16
    upright, turned = (
        struct.pack(">9i", *m, 0, 0, 0, 1 << 30) for m in ((unit, 0, 0, 0, unit), (0, unit, 0, -unit, 0))
    )
    data = bytearray(clip.read_bytes())
    at = data.index(upright, data.index(b"tkhd"))
    data[at : at + len(turned)] = turned
    clip.write_bytes(data)
    first = next(read_video(clip)).image
    assert difference(first, torch.rot90(frame(0), -1, (1, 2))) < 4


def test_a_gif_is_a_video_too(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (20, 10), color) for color in ("white", "black", "white")]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=200)
    assert [f.image.float().mean().item() > 128 for f in read_video(tmp_path / "x.gif")] == [True, False, True]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not a video at all" * 50, "not a video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.mp4\n#EXT-X-ENDLIST\n", "not a video"),
        (b"ffconcat version 1.0\nfile clip.mp4\n", "not a video"),
        (None, "is damaged|not a video|has no frames"),
    ],
)
def test_bad_files_are_refused_in_one_line_with_their_name(content: bytes | None, said: str, clip: Path) -> None:
    """Playlists would open other files."""
    path = clip.with_name("x.mp4")
    path.write_bytes(clip.read_bytes()[:-600] if content is None else content)
    with pytest.raises(BadInput, match=said) as error:
        list(read_video(path))
    assert "x.mp4" in str(error.value)
    assert "\n" not in str(error.value)


def test_sound_alone_and_large_frames_are_refused(clip: Path) -> None:
    import av

    with av.open(str(clip.with_name("sound.mp4")), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        silence.rate = 8000
        silence.planes[0].update(bytes(4096))
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(BadInput, match="no video stream"):
        video_facts(clip.with_name("sound.mp4"))
    unknown = clip.with_name("codec.mp4")
    unknown.write_bytes(clip.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(BadInput, match="no video stream that can be decoded"):
        next(read_video(unknown))
    with pytest.raises(BadInput, match="64 x 48 pixels"):
        next(read_video(clip, max_pixels=1000))
    with pytest.raises(BadInput, match="not there"):
        next(read_video(clip.with_name("missing.mp4")))


def test_a_video_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    def write_two_sizes() -> None:
        with VideoWriter(tmp_path / "x.mp4") as writer:
            writer.write(frame(0))
            writer.write(frame(0, 32, 32))

    with pytest.raises(BadInput, match="expected 64 x 48"):
        write_two_sizes()
    with VideoWriter(tmp_path / "none.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match=r"\.mp4"):
        VideoWriter(tmp_path / "x.txt")
