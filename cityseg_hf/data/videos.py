"""Videos, read and written frame by frame with PyAV."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cityseg_hf.errors import UserError, one_line


def require_av() -> ModuleType:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'cityseg_hf[video]' (or av)") from None
    return av


class Frame(NamedTuple):
    """A picture of a video."""

    image: np.ndarray
    """``uint8[H, W, 3]``, RGB, turned as its camera says."""
    time: int | None
    """When it is shown, in units of the video's time base."""


class Video:
    """The frames of a video, one at a time; also a context that closes it.

    Attributes:
        rate: frames per second.
        time_base: the seconds that one unit of ``Frame.time`` lasts.
        length: how many frames there are, as far as the file says.

    Raises:
        UserError: PyAV is missing or cannot open the file; in iteration, what is in it cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._av = path, require_av()
        try:
            self._container = self._av.open(str(path))
        except self._av.FFmpegError as error:
            raise self._broken(error) from None
        if not self._container.streams.video:
            self._container.close()
            raise UserError(f"{path} has no pictures in it")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self.time_base = stream.time_base or 1 / self.rate
        seconds = stream.duration * self.time_base if stream.duration else 0
        self.length = stream.frames or round(seconds * self.rate) or None

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *raised: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        shape = None
        try:
            for frame in self._container.decode(video=0):
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if image.shape != (shape := shape or image.shape):
                    raise UserError(f"{self.path} is no readable video (its frames change their size)")
                yield Frame(image, frame.pts)
        except self._av.FFmpegError as error:
            raise self._broken(error) from None
        if shape is None:
            raise UserError(f"{self.path} is no readable video (there is no frame in it)")

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.path} is no readable video ({one_line(error)})")


class VideoWriter:
    """Writes an MP4 (H.264, without sound) that keeps the times of another video's frames; a context that ends it.

    Args:
        path: the file; its suffix does not matter.
        like: the other video.
    """

    def __init__(self, path: Path, like: Video) -> None:
        self._av, self._like, self._stream = require_av(), like, None
        self._container = self._av.open(str(path), "w", format="mp4")
        # Ticks of 1/90000 s or less, such that a frame lasts a whole number of them.
        self._ticks = like.rate.numerator * -(-90000 // like.rate.numerator)  # per second
        self._step = int(self._ticks / like.rate)
        self._last: int | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *raised: object) -> None:
        try:
            if self._stream is not None and kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def write(self, image: np.ndarray, time: int | None) -> None:
        """Adds a picture ``uint8[H, W, 3]``; odd sides are made even by repeating the last row or column."""
        image = np.pad(image, [(0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)], mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("h264", rate=self._like.rate, options={"crf": "18"})
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.pix_fmt = "yuv420p"  # what every player shows; it halves the sides of the colours
            self._stream.codec_context.time_base = Fraction(1, self._ticks)
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self._tick(time), Fraction(1, self._ticks)
        self._container.mux(self._stream.encode(frame))

    def _tick(self, time: int | None) -> int:
        last = self._last if self._last is not None else -self._step
        tick = last + self._step if time is None else round(time * self._like.time_base * self._ticks)
        # Some containers round times to milliseconds: frames that are even but for that stay even.
        even = round(tick / self._step) * self._step
        if abs(even - tick) <= self._like.time_base * self._ticks:
            tick = even
        # Damaged files repeat times; encoders take only rising ones.
        self._last = tick if self._last is None or tick > last else last + self._step
        return self._last
