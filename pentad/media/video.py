"""Video files <-> streams of frames: uint8 [3, H, W], red, green, blue, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from os.path import isdir, isfile
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import torch
from torch import Tensor

from pentad.errors import BadInput, PentadError
from pentad.media.images import MAX_PIXELS

try:
    import av
except ModuleNotFoundError as error:
    raise BadInput("videos need PyAV; install it: pip install 'pentad[vision]'") from error

__all__ = ["Frame", "VideoFacts", "VideoWriter", "read_video", "video_facts"]

# Containers only: FFmpeg also reads playlists, which name other files and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,ogg,flv,asf,h264,hevc,apng,ivf"
_TICK = Fraction(1, 90_000)  # seconds


class Frame(NamedTuple):
    """One picture of a video.

    Attributes:
        image: uint8 [3, H, W], turned as a player shows it.
        time: seconds since the video's start.
        number: it counts from 0, skipped frames too.
    """

    image: Tensor
    time: float
    number: int


class VideoFacts(NamedTuple):
    """What a video's header says.

    Attributes:
        frames: an estimate; None if the header has no duration.
        rate: frames a second, on average.
    """

    frames: int | None
    rate: Fraction


def video_facts(path: str | Path) -> VideoFacts:
    """Read a video's header. Raises BadInput as `read_video`."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        frames = stream.frames
        if not frames and container.duration:
            frames = round(container.duration / av.time_base * rate)
        return VideoFacts(frames or None, Fraction(rate))


def read_video(path: str | Path, *, every: int = 1, max_pixels: int = MAX_PIXELS) -> Iterator[Frame]:
    """Decode a video frame by frame; memory doesn't grow with its length.

    Args:
        path: a file; its format is recognized by content.
        every: skip frames: 1 gives all, 2 each other one.
        max_pixels: larger frames are refused.

    Raises:
        BadInput: the file is no video, is damaged or has no frames; the message tells how far it was read.
    """
    index = -1
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.width * stream.height > max_pixels:
            raise BadInput(f"{path} has {stream.width} x {stream.height} pixels; expected at most {max_pixels:,}")
        stream.thread_type, stream.codec_context.options = "AUTO", {"max_pixels": str(max_pixels)}
        rate, start = stream.average_rate or Fraction(25), None
        try:
            for index, frame in enumerate(container.decode(stream)):
                if index % every:
                    continue
                time = index / rate if frame.time is None else frame.time
                start = time if start is None else start
                pixels_HW3 = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                turned = torch.rot90(pixels_HW3, round(frame.rotation / 90) % 4)
                yield Frame(turned.contiguous().permute(2, 0, 1), float(time - start), index)
        except av.FFmpegError as error:
            raise BadInput(f"{path} is damaged after {index + 1} frames: {error.strerror}") from error
    if index < 0:
        raise BadInput(f"{path} has no frames")


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    path = Path(path)
    if not isfile(path):
        raise BadInput(f"{path} is {'a folder' if isdir(path) else 'not there'}; expected a video file")
    with path.open("rb") as file:
        container = _container(path, file)
        try:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise BadInput(f"{path} has no video stream that can be decoded")
            yield container
        finally:
            container.close()


def _container(path: Path, file: IO[bytes]) -> Any:
    try:
        return av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": ""})
    except PermissionError as error:
        raise BadInput(f"{path} can't be read: {error.strerror}") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        empty = not path.stat().st_size
        raise BadInput(f"{path} is {'empty' if empty else 'not a video, or its header is damaged'}") from error


class VideoWriter:
    """Writes an MP4 file, in H.264 where PyAV has an encoder of it; a context manager.

    The file appears when the context ends without an error.

    Args:
        path: ends in .mp4.
        rate: frames a second, for players; each frame has its own time.
    """

    def __init__(self, path: str | Path, rate: Fraction | float = 25) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise BadInput(f"{path} is no name of a video that pentad writes; expected .mp4")
        self.rate = Fraction(rate).limit_denominator(1001)
        self._stream: Any = None
        self._size: tuple[int, int] | None = None
        self._last = -1
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")

    def __enter__(self) -> Self:
        try:
            self._container: Any = av.open(str(self._partial), "w", options={"movflags": "+faststart"})
        except OSError as error:
            raise PentadError(f"{self.path} can't be written: {error.strerror}") from error
        return self

    def write(self, image_3HW: Tensor, time: float | None = None) -> None:
        """Append a frame, all of one size.

        Args:
            image_3HW: uint8.
            time: seconds since the start; by default one frame after the last.
        """
        height, width = image_3HW.shape[1:]
        if self._size is None:
            self._size = height, width
            self._stream = self._container.add_stream(_codec(), rate=self.rate, options={"crf": "20"})
            self._stream.pix_fmt, self._stream.codec_context.time_base = "yuv420p", _TICK
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
        if self._size != (height, width):
            raise BadInput(f"a frame is {width} x {height}; expected {self._size[1]} x {self._size[0]}, as the first")
        pixels_HW3 = image_3HW.permute(1, 2, 0)
        if height % 2 or width % 2:  # H.264 wants even sides: the last row and column are repeated
            rows, columns = (torch.arange(side + side % 2).clamp(max=side - 1) for side in (height, width))
            pixels_HW3 = pixels_HW3[rows][:, columns]
        frame = av.VideoFrame.from_ndarray(pixels_HW3.contiguous().numpy(), format="rgb24")
        due = self._last + round(1 / self.rate / _TICK) if time is None and self._last >= 0 else _ticks(time or 0)
        self._last = max(self._last + 1, due)
        frame.pts, frame.time_base = self._last, _TICK
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None and self._stream is not None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def _ticks(seconds: float) -> int:
    return round(seconds / _TICK)


def _codec() -> str:
    """The best encoder of this build of FFmpeg that writes into MP4."""
    return next(name for name in ("libx264", "libopenh264", "mpeg4") if name in av.codecs_available)
