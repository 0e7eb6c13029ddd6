"""Pictures of every kind, and the detector on the extra photographs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fields.data.detect import FaceDetector, check, detect, windows
from fields.data.mesh import MEDIAPIPE_105, Face, TaskMesh
from fields.data.window import Window, cut, overlap
from fields.media import check_clip, check_image, read_frames, read_image

DATA = os.environ.get("FIELDS_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FIELDS_TEST_DATA is not set")


def ramp(size=32):
    y, x = np.mgrid[:size, :size]
    return np.stack([x * 255 // (size - 1), y * 255 // (size - 1), np.full_like(x, 90)], -1).astype(np.uint8)


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return read_image(folder / name)


def test_every_mode(tmp_path):
    rgb = Image.fromarray(ramp())
    grey = rgb.convert("L")
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(32)[None] < 16, 255, 0).astype(np.uint8).repeat(32, 0)))
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) * 257))
    for name, image in {"rgb.png": rgb, "rgb.bmp": rgb, "rgb.webp": rgb, "rgb.tif": rgb}.items():
        options = {"lossless": True} if name.endswith("webp") else {}
        np.testing.assert_array_equal(saved(tmp_path, name, image, **options), ramp())
    for name, image in {
        "grey.png": grey,
        "grey.jpg": grey,
        "deep.png": deep,
        "deep.tif": deep,
        "float.tif": Image.fromarray(np.asarray(grey, np.float32) / 255),
        "int.tif": Image.fromarray(np.asarray(grey, np.int32) * 257),
    }.items():
        found = saved(tmp_path, name, image)
        assert (
            found.shape == (32, 32, 3)
            and found.dtype == np.uint8
            and np.abs(found.astype(int) - np.asarray(grey)[..., None]).max() <= (3 if name.endswith("jpg") else 1)
        ), name
    transparent = saved(tmp_path, "clear.png", clear)
    np.testing.assert_array_equal(transparent[:, :16], ramp()[:, :16])
    assert (transparent[:, 16:] == 255).all()
    assert saved(tmp_path, "la.png", clear.convert("LA")).shape == (32, 32, 3)
    assert (
        np.abs(saved(tmp_path, "palette.png", rgb.convert("P", palette=Image.ADAPTIVE)).astype(int) - ramp()).mean() < 8
    )
    assert np.abs(saved(tmp_path, "cmyk.jpg", rgb.convert("CMYK"), quality=95).astype(int) - ramp()).mean() < 8
    assert saved(tmp_path, "bits.png", grey.convert("1")).max() == 255
    animated = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert (
        np.abs(
            saved(tmp_path, "moves.gif", animated[0], save_all=True, append_images=animated[1:])[0, 0].astype(int)
            - [255, 0, 0]
        ).max()
        <= 2
    )
    transparent_palette = rgb.convert("P", palette=Image.ADAPTIVE)
    assert saved(tmp_path, "clear_palette.png", transparent_palette, transparency=0).shape == (32, 32, 3)
    assert saved(tmp_path, "one.png", Image.new("RGB", (1, 1))).shape == (1, 1, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(tmp_path, orientation):
    """Whatever way the camera was held, the picture comes out upright."""
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:8, :10] = 255
    steps = {
        1: [],
        2: [Image.FLIP_LEFT_RIGHT],
        3: [Image.ROTATE_180],
        4: [Image.FLIP_TOP_BOTTOM],
        5: [Image.TRANSPOSE],
        6: [Image.ROTATE_90],
        7: [Image.TRANSVERSE],
        8: [Image.ROTATE_270],
    }[orientation]
    image = Image.fromarray(upright)
    for step in steps:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright)


BROKEN = {
    "none.jpg": (None, "there is no file"),
    "empty.jpg": (b"", "is empty"),
    "page.png": (b"<html>not found</html>", "not a picture that Pillow knows"),
    "cut.jpg": ("cut", "is damaged"),
    "cut.png": ("cut", "is damaged"),
    "huge.png": ("huge", "more pixels than is safe"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "not a picture"),
    "folder.jpg": ("folder", "is a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures(tmp_path, name):
    content, sentence = BROKEN[name]
    path = tmp_path / name
    if content == "cut":
        Image.fromarray(ramp(64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "huge":
        import struct
        import zlib

        chunk = lambda kind, data: (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", b"")
            + chunk(b"IEND", b"")
        )
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_image(path)
    assert sentence in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_quick_checks(tmp_path):
    assert check_image(tmp_path / "no.jpg")[0] == "missing" and check_clip(tmp_path / "no.mp4")[0] == "missing"
    Image.fromarray(ramp()).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + b"\0" * 100)
    assert check_image(tmp_path / "a.jpg") is None and check_image(tmp_path / "b.jpg") is None, (
        "padding behind the end is harmless"
    )
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_frames(tmp_path / "no.mp4", [0])


def test_frames_of_a_video(tmp_path):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 64))
    for k in range(9):
        writer.write(np.full((64, 64, 3), (25 * k, 0, 250 - 25 * k), np.uint8))
    writer.release()
    assert check_clip(tmp_path / "a.mp4") == 9
    frames = read_frames(tmp_path / "a.mp4", [0, 4, 8])
    assert [abs(int(f[..., 2].mean()) - 25 * k) < 12 for f, k in zip(frames, (0, 4, 8))] == [True] * 3 and frames[0][
        ..., 0
    ].mean() > 230, "channels are RGB"
    with pytest.raises(ValueError, match="frame 9 cannot be decoded"):
        read_frames(tmp_path / "a.mp4", [2, 9])


def test_windows_cover_and_invert():
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (480, 640), (300, 100)):
        for group in windows(height, width):
            for window in group:
                points = rng.uniform(0, window.size, (20, 3))
                face = window.back(Face(points, 1.0))
                np.testing.assert_allclose(
                    face.points478[:, :2] @ window.matrix[:, :2].T + window.matrix[:, 2], points[:, :2], atol=1e-2
                )
    halves = windows(480, 640)[2]
    inside = np.zeros((480, 640), bool)
    for w in halves:
        inside[
            int(max(0, w.cy - w.side / 2)) : int(w.cy + w.side / 2) + 1,
            int(max(0, w.cx - w.side / 2)) : int(w.cx + w.side / 2) + 1,
        ] = True
    assert inside.all()
    assert Window(10, 10, 20, 90).cut(np.zeros((20, 20, 3), np.uint8)).shape == (256, 256, 3)
    with pytest.raises(KeyError):
        cut(np.zeros((4, 4, 3), np.uint8), np.eye(2, 3), 4, "blue")


def test_bad_input_to_the_detector():
    for bad in (np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 RGB"):
            detect(bad)
    with pytest.raises(ValueError, match="at least one face"):
        FaceDetector(0)
    with pytest.raises(FileNotFoundError, match="leave the option out"):
        FaceDetector(task="none.task")
    assert detect(np.zeros((1, 1, 3), np.uint8)) == []


def test_noise_holds_no_face():
    rng = np.random.default_rng(0)
    found = 0
    for size in (8, 32, 128):
        noise = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).resize((120, 120), Image.BICUBIC)
        found += len(detect(np.asarray(noise)))
    assert found == 0


def test_a_broken_task_file(tmp_path):
    (tmp_path / "face_landmarker.task").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is not a face_landmarker.task"):
        TaskMesh(tmp_path / "face_landmarker.task", 1, 0.1)


def test_tasks_interface(monkeypatch, tmp_path):
    """Without a model file the interface is tried on a stand-in that answers with known points."""
    from mediapipe.tasks.python import vision

    class Landmarker:
        def __init__(self, options):
            self.options = options

        def detect(self, image):
            h, w = image.numpy_view().shape[:2]
            assert self.options.min_face_detection_confidence == self.options.min_face_presence_confidence == 0.1
            points = [
                type("Point", (), {"x": 0.3 + 0.4 * (k % 22) / 22, "y": 0.3 + 0.4 * (k // 22) / 22, "z": -0.1})()
                for k in range(478)
            ]
            return type("Result", (), {"face_landmarks": [points] if w >= 40 else []})()

        def close(self):
            pass

    monkeypatch.setattr(
        vision.FaceLandmarker, "create_from_options", classmethod(lambda cls, options: Landmarker(options))
    )
    (tmp_path / "face_landmarker.task").write_bytes(b"model")
    detector = TaskMesh(tmp_path / "face_landmarker.task", 1, 0.1)
    face = detector(np.zeros((50, 80, 3), np.uint8))[0]
    np.testing.assert_allclose(face.points478[0], [24, 15, -8], atol=1e-4)
    assert face.points478.shape == (478, 3) and face.score == 1.0
    detector.close()


def test_nothing_is_written_to_standard_error():
    code = "import numpy as np; from fields.data.detect import detect; detect(np.full((64, 64, 3), 90, np.uint8))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == ""


def test_import_is_light():
    code = "import sys, fields.data.detect, fields.data.readers, fields.data.prepare; print([m for m in ('mediapipe', 'cv2', 'matplotlib', 'pandas', 'onnxruntime', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() == "[]"
    )


# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos():
    paths = sorted((Path(DATA) / "photos").glob("*"))
    images = [read_image(p) for p in paths]
    small = [np.asarray(Image.fromarray(i).resize((224, 224), Image.LANCZOS)) for i in images]
    return small, [detect(i)[0].points478[:, :2] for i in small]


def error(face, points):
    return np.linalg.norm(face.points478[:, :2] - points, axis=1).mean() / np.linalg.norm(points[33] - points[263])


@needs_data
def test_every_photograph(photos):
    images, points = photos
    assert len(points) >= 15
    for image, p in zip(images, points):
        face = detect(image)[0]
        assert face.score > 0.5 and error(face, p) < 1e-6 and 0 <= overlap(face, face) <= 1.0001
        assert check(FaceDetector().mesh, image, face) is not None or face.score > 0.85
    embedding = np.load(Path(DATA) / "head" / "mediapipe_landmark_embedding.npz")["landmark_indices"]
    assert tuple(embedding.tolist()) == MEDIAPIPE_105


@needs_data
@pytest.mark.parametrize("degrees", [45, 90, 135, 180, 270])
def test_turned(photos, degrees):
    images, points = photos
    window = Window(112, 112, 330, degrees, 330)
    worst = []
    for image, p in zip(images[::2], points[::2]):
        faces = detect(window.cut(image))
        worst.append(error(faces[0], p @ window.matrix[:, :2].T + window.matrix[:, 2]) if faces else 9)
    assert np.median(worst) < 0.04 and np.max(worst) < 0.12, worst


@needs_data
@pytest.mark.parametrize("side", [100, 50])
def test_small(photos, side):
    images, points = photos
    for image, p in list(zip(images, points))[::5]:
        canvas = np.full((360, 480, 3), 110, np.uint8)
        canvas[200 : 200 + side, 300 : 300 + side] = np.asarray(
            Image.fromarray(image).resize((side, side), Image.LANCZOS)
        )
        faces = detect(canvas)
        assert faces and error(faces[0], p * side / 224 + [300, 200]) < 0.1


@needs_data
def test_tight(photos):
    for image, p in list(zip(*photos))[::3]:
        (x0, y0), (x1, y1) = p.min(0).clip(0, 223).astype(int), p.max(0).clip(0, 223).astype(int)
        faces = detect(np.ascontiguousarray(image[y0:y1, x0:x1]))
        assert faces and error(faces[0], p - [x0, y0]) < 0.08


@needs_data
def test_several_faces(photos):
    images, points = photos
    canvas = np.concatenate([np.concatenate(images[k : k + 2], 1) for k in (0, 2)])
    faces = FaceDetector(max_faces=6)(canvas)
    centres = np.array([p.mean(0) + [224 * (k % 2), 224 * (k // 2)] for k, p in enumerate(points[:4])])
    nearest = [np.linalg.norm(centres - f.points478[:, :2].mean(0), axis=1).argmin() for f in faces]
    assert sorted(nearest) == list(range(4)), nearest
    areas = [np.prod(f.box[2:] - f.box[:2]) for f in faces]
    assert areas == sorted(areas, reverse=True)


@needs_data
def test_other_kinds_of_pictures_give_the_same_face(photos, tmp_path):
    image, points = photos[0][10], photos[1][10]
    rgb = Image.fromarray(image)
    exif = Image.Exif()
    exif[274] = 6
    alpha = rgb.convert("RGBA")
    alpha.putalpha(255)
    kinds = {
        "alpha.png": (alpha, {}),
        "turned.png": (rgb.transpose(Image.ROTATE_90), {"exif": exif}),
        "print.tif": (rgb.convert("CMYK"), {}),
        "grey.png": (rgb.convert("L"), {}),
        "deep.png": (Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257), {}),
    }
    for name, (picture, options) in kinds.items():
        picture.save(tmp_path / name, **options)
        assert error(detect(tmp_path / name)[0], points) < (0.05 if name in ("grey.png", "deep.png") else 0.02), name


@needs_data
def test_clip():
    path = Path(DATA) / "clips" / "talk.mp4"
    frames = read_frames(path, range(check_clip(path)))
    assert len(frames) == 54
    detector = FaceDetector()
    assert all(len(detector(f)) == 1 for f in frames[::6])


@pytest.mark.slow
def test_optional_networks(tmp_path):
    """FAN with random weights: the file is read, the answer lies inside its window."""
    import torch

    models = pytest.importorskip("face_alignment.models")
    from fields.data.points2d import FanPoints, fan_window

    torch.manual_seed(0)
    path = tmp_path / "2DFAN4-random.pth.tar"
    torch.save(models.FAN(4).state_dict(), path)
    points = np.random.default_rng(0).uniform(60, 160, (478, 2))
    found = FanPoints(path)(np.full((224, 224, 3), 90, np.uint8), points)
    window = fan_window(points)
    assert found.shape == (68, 2) and np.abs(found - [window.cx, window.cy]).max() <= window.side / 2
