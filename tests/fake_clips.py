"""Clips that tests make themselves: any container, turned, mirrored, with odd pixels and odd times, with sound."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".webm": "libvpx", ".wmv": "wmv2", ".flv": "flv1", ".mpg": "mpeg2video", ".avi": "mpeg4", ".3gp": "h263"}
SOUNDS = {".webm": "libopus", ".wmv": "wmav2", ".flv": "libmp3lame", ".mpg": "mp2", ".avi": "pcm_s16le"}


def corners(height=48, width=80):
    """A picture whose corners are red, green, blue and white, from the upper left in reading order."""
    picture = np.full((height, width, 3), 90, np.uint8)
    h, w = height // 2, width // 2
    picture[:h, :w], picture[:h, w:], picture[h:, :w], picture[h:, w:] = (
        (220, 20, 20),
        (20, 220, 20),
        (20, 20, 220),
        (240, 240, 240),
    )
    return picture


def corner_names(picture):
    """Read the corners back: 'rgbw' is upright."""
    height, width = picture.shape[:2]
    names = ""
    for row in (height // 4, 3 * height // 4):
        for column in (width // 4, 3 * width // 4):
            r, g, b = (int(v) > 128 for v in picture[row, column])
            names += "w" if r and g and b else "r" if r else "g" if g else "b" if b else "?"
    return names


def write_clip(
    path,
    pictures,
    rate=25,
    times=None,
    matrix=None,
    pixels=None,
    sound=0.0,
    codec=None,
    audio=None,
    options=None,
    gop=12,
):
    """Write a clip; `matrix` is (a, b, c, d) of the display matrix, `pixels` the shape of a pixel, `sound` seconds."""
    path = Path(path)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec or CODECS.get(path.suffix.lower(), "libx264"), rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate, stream.gop_size = 2_000_000, gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if pixels:
            stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = Fraction(*pixels)
        if matrix:
            a, b, c, d = (v * 65536 for v in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        hum = container.add_stream(audio or SOUNDS.get(path.suffix.lower(), "aac"), rate=48000) if sound else None
        if hum:
            hum.bit_rate = 64_000
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if hum:
            wave = (8000 * np.sin(np.arange(int(48000 * sound)) / 20)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            container.mux(hum.encode(frame))
            container.mux(hum.encode(None))
    return path
