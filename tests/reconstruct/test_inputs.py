"""What users bring: turned clips, clips that are cut off, odd files, folders of everything, results that must stay."""

import csv
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from fake_clips import corner_names, corners, write_clip
from PIL import Image

from fields import Head, Reconstructor
from fields.config import NetworkConfig
from fields.film import Film
from fields.inputs import find_inputs
from fields.media import read_frames, read_image
from fields.models.fields import FieldsModel
from fields.reconstruct import reconstruct_files
from fields.tracks import smooth_clip
from fields.video import Clip

ASTRONAUT = skimage.data.astronaut()
FACE = np.asarray(Image.fromarray(ASTRONAUT[:256, 100:356]))
TURNS = {  # (a, b, c, d) of a display matrix -> the corners of the picture as it must be shown
    "upright": ((1, 0, 0, 1), "rgbw"),
    "right": ((0, 1, -1, 0), "brwg"),
    "left": ((0, -1, 1, 0), "gwrb"),
    "half": ((-1, 0, 0, -1), "wbgr"),
    "mirror": ((-1, 0, 0, 1), "grwb"),
    "flip": ((1, 0, 0, -1), "bwrg"),
    "transposed": ((0, 1, 1, 0), "rbgw"),
}


@pytest.fixture(scope="module")
def rec():
    head = Head.load("open")
    return Reconstructor(FieldsModel(NetworkConfig(image_size=64), head, seed=0), head)


def run(rec, inputs, out, **options):
    options = {"panel_pictures": False, "quiet": True, "meshes": ()} | options
    return reconstruct_files(rec, inputs, out, **options)


def table(out, name="predictions.csv"):
    with open(out / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_clips_stand_upright(suffix, tmp_path):
    for name, (matrix, seen) in TURNS.items():
        path = write_clip(tmp_path / f"{name}{suffix}", [corners()] * 3, matrix=matrix)
        first = next(iter(Clip(path))).image
        assert corner_names(first) == seen, name
        assert corner_names(read_frames(path, [2])[0]) == seen, name


def test_pictures_stand_upright(tmp_path):
    picture, seen = Image.fromarray(corners()), ["rgbw", "grwb", "wbgr", "bwrg", "rbgw", "brwg", "wgbr", "gwrb"]
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for name in ("a.jpg", "a.png", "a.webp", "a.tif", "a.avif"):
            picture.save(tmp_path / name, exif=exif)
            assert corner_names(read_image(tmp_path / name)) == seen[turn - 1], (turn, name)


def test_pixels_become_square(tmp_path):
    for pixels, shape in (((2, 1), (48, 160, 3)), ((1, 2), (96, 80, 3))):
        for name in ("a.mp4", "a.mkv", "a.avi"):
            path = write_clip(tmp_path / name, [corners()] * 2, pixels=pixels)
            assert next(iter(Clip(path))).image.shape == shape, (pixels, name)
    turned = write_clip(tmp_path / "t.mp4", [corners()] * 2, pixels=(2, 1), matrix=TURNS["right"][0])
    assert next(iter(Clip(turned))).image.shape == (160, 48, 3)
    Image.fromarray(corners()).save(tmp_path / "fax.tif", dpi=(200, 100))
    assert read_image(tmp_path / "fax.tif").shape == (96, 80, 3)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.m4v", "a.mov", "a.mkv", "a.webm", "a.ts", "a.wmv", "a.mpg", "a.flv", "a.avi"]
)
def test_every_container_is_read(name, tmp_path):
    clip = Clip(write_clip(tmp_path / name, [corners()] * 20, sound=0.8))
    frames = list(clip)
    assert len(frames) == 20 and not clip.missing() and corner_names(frames[9].image) == "rgbw"
    steps = np.diff([frame.time for frame in frames])
    assert (abs(steps - 0.04) < 0.002).all() and abs(frames[0].time) < 0.1


def test_a_clip_that_is_cut_off(rec, tmp_path):
    whole = write_clip(
        tmp_path / "whole.mp4", [np.roll(FACE, k, 1) for k in range(16)], gop=1, options={"movflags": "faststart"}
    )
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(0.6 * len(data))])
    summary = run(rec, [tmp_path / "cut.mp4"], tmp_path / "out")
    assert summary.code == 2 and 0 < summary.faces < 16
    assert f"cut off: {summary.faces} of 16 frames" in str(summary)
    assert len(table(tmp_path / "out")) == summary.faces
    for name in ("c.mkv", "c.webm", "c.avi"):
        data = write_clip(tmp_path / name, [corners()] * 60).read_bytes()
        (tmp_path / name).write_bytes(data[: int(0.6 * len(data))])
        clip = Clip(tmp_path / name)
        assert 0 < len(list(clip)) < 60 and "cut off" in clip.missing(), name


def test_codecs_and_sound_alone_are_named(tmp_path):
    path = write_clip(tmp_path / "a.mp4", [corners()] * 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(ValueError, match="zzz1|decoder"):
        list(Clip(path))
    (tmp_path / "b.mp4").write_bytes(b"no clip at all")
    with pytest.raises(ValueError, match="b.mp4 is no video"):
        Clip(tmp_path / "b.mp4")


def test_time_of_the_container(rec, tmp_path):
    times = [0, 0.04, 0.3, 0.34, 1.0, 1.04]
    write_clip(tmp_path / "v.mp4", [np.roll(FACE, k, 1) for k in range(6)], times=times)
    run(rec, [tmp_path / "v.mp4"], tmp_path / "out", panel_pictures=True, film=Film)
    rows = table(tmp_path / "out")
    assert [int(row["frame"]) for row in rows] == list(range(6))
    assert np.allclose([float(row["seconds"]) for row in rows], times, atol=0.001)
    with np.load(tmp_path / "out" / "v_f00004.npz") as z:
        assert z["frame"] == 4 and abs(z["seconds"] - 1.0) < 0.001
    assert np.allclose([frame.time for frame in Clip(tmp_path / "out" / "v.mp4")], times, atol=0.001)


def test_film_with_gaps_and_sound(rec, tmp_path):
    pictures = [np.roll(FACE, k, 1) if 4 <= k < 8 else np.full_like(FACE, 90) for k in range(12)]
    write_clip(tmp_path / "g.mov", pictures, sound=0.48, audio="pcm_s16le")
    summary = run(rec, [tmp_path / "g.mov"], tmp_path / "out", panel_pictures=True, film=Film, finish=smooth_clip)
    assert (summary.faces, summary.code) == (4, 2) and "no face was found in 8 of 12 frames" in str(summary)
    film = Clip(tmp_path / "out" / "g.mp4")
    sound = [s.codec_context.name for s in film.container.streams.audio]
    assert sound == ["aac"] and film.stream.codec_context.name == "h264"
    assert len(list(film)) == 12 and abs(film.seconds - 0.48) < 0.1
    assert table(tmp_path / "out", "left_out.csv")[0]["count"] == "8"


def pair():
    return Image.fromarray(np.concatenate([ASTRONAUT[:300, 60:400], ASTRONAUT[:300, 400:60:-1]], 1))


def test_no_result_is_overwritten(rec, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    pair().save(folder / "party.png")
    for name in ("party_0.png", "Party_1.png"):
        Image.fromarray(FACE).save(folder / name)
    for rows in (4, 8):
        assert run(rec, [folder], out).faces == 4
        names = [row["name"] for row in table(out)]
        assert len({name.casefold() for name in names}) == rows == len(list(out.glob("*.npz")))
    before = (folder / "party_0.png").read_bytes()
    run(rec, [folder / "party_0.png"], folder, panel_pictures=True)  # results beside the photograph
    assert (folder / "party_0.png").read_bytes() == before and len(list(folder.glob("*.npz"))) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of ours"):
        run(rec, [folder / "party_0.png"], tmp_path / "other")


def test_forty_odd_files_add_up(rec, tmp_path):
    """Every file of a folder is done, done in part, not done or left aside; nothing else, and nothing twice."""
    folder, small = tmp_path / "in", Image.fromarray(FACE).resize((128, 128))
    (folder / "more").mkdir(parents=True)
    for ending in ("jpg", "jpeg", "jfif", "png", "bmp", "webp", "tif", "gif", "avif", "ppm", "tga", "JPG"):
        small.save(folder / f"a_{ending}.{ending}", format={"jfif": "JPEG", "tga": "TGA"}.get(ending))
    from pillow_heif import from_pillow

    from_pillow(small).save(folder / "phone.heic")
    small.save(folder / "without_ending", format="JPEG")
    small.save(folder / "more" / "a_jpg.jpg")
    small.save(folder / "naïve 日本.jpg")
    for ending in ("gif", "webp", "png", "tif"):
        small.save(folder / f"moves.{ending}", save_all=True, append_images=[small.rotate(5), small.rotate(9)])
    pair().resize((340, 150)).save(folder / "pair.png")
    for ending in ("mp4", "m4v", "ts", "wmv", "flv", "webm"):
        write_clip(folder / f"clip_{ending}.{ending}", [np.asarray(small)] * 2)
    whole = write_clip(
        tmp_path / "w.mp4", [np.asarray(small)] * 12, gop=1, options={"movflags": "faststart"}
    ).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: int(0.8 * len(whole))])
    for name, content in {
        "text.jpg": b"a letter",
        "empty.png": b"",
        "empty.mp4": b"",
        "noise.webm": b"\x1aE\xdf\xa3",
    }.items():
        (folder / name).write_bytes(content)
    for name in ("notes.txt", "table.csv", "raw.cr2", "song.mp3", "paper.pdf", ".hidden.jpg"):
        (folder / name).write_bytes(b"something else")
    Image.new("RGB", (64, 64), "gray").save(folder / "wall.jpg")
    (tmp_path / "elsewhere").mkdir()
    small.save(tmp_path / "elsewhere" / "linked.jpg")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "back").symlink_to(folder)
    files = [p for p in folder.rglob("*") if p.is_file()] + [folder / "link" / "linked.jpg"]
    assert len(set(files)) >= 40
    summary = run(rec, [folder], tmp_path / "out", max_faces=1)
    counts = summary.counts
    assert sum(counts.values()) == len(set(files)), (counts, len(set(files)))
    assert counts == {"whole": 23, "in part": 6, "not": 5, "left aside": 6}, (counts, str(summary))
    rows = table(tmp_path / "out", "left_out.csv")
    assert {row["kind"] for row in rows} >= {"hidden", "no picture", "raw picture", "further pictures of a file"}
    assert [row["count"] for row in rows if row["kind"] == "faces beyond --faces"] == ["1"] and summary.code == 2
    assert str(sum(counts.values())) in str(summary).splitlines()[-1]


def test_hollow_and_missing(tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="1 other files"):
        find_inputs([tmp_path / "hollow"])


def test_reconstructor_takes_what_people_have(rec, tmp_path):
    import torch

    path = tmp_path / "a.png"
    Image.fromarray(FACE).save(path)
    expected = rec(FACE).params.jaw
    clear = np.dstack([FACE, np.full(FACE.shape[:2], 255, np.uint8)])
    tensor = torch.from_numpy(FACE.copy())
    arrays = [clear, FACE / 255.0, FACE.astype(np.uint16) * 257]
    tensors = [tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1)[None].float()]
    for given in (str(path), path, [str(path)], Image.open(path), [Image.open(path)], *arrays, *tensors):
        assert torch.allclose(rec(given).params.jaw, expected, atol=1e-5), type(given)
    assert len(rec(FACE[..., 0])) == 1
    crop = rec.stack(rec.crop(FACE))
    assert torch.allclose(rec(crop).params.jaw, rec(crop * 255).params.jaw, atol=1e-5)
    for given, said in (
        (7, "int is no picture"),
        (np.zeros(5), "is no picture"),
        ([], "no face"),
        (FACE - 200.0, "between"),
    ):
        with pytest.raises(ValueError, match=said):
            rec(given)
    assert "clip" in pytest.raises(ValueError, rec, "a.mp4").value.args[0]


def test_prediction_prints_and_saves(rec, tmp_path):
    prediction = rec(pair(), max_faces=2)
    text = repr(prediction)
    assert len(text.splitlines()) == 3 and "tensor" not in text and prediction.emotion[0] in text
    assert "<img" in prediction._repr_html_() and len(repr(prediction.params)) < 200
    assert prediction.vertices.shape == (2, *rec.head.template.shape)
    assert [path.name for path in prediction.save_glb(tmp_path / "p.glb")] == ["p_0_0.glb", "p_0_1.glb"]
    prediction.save(tmp_path / "p.npz")
    assert type(prediction).load(tmp_path / "p.npz").with_head().vertices.shape == prediction.vertices.shape


def test_glb_of_a_viewer(rec, tmp_path):
    from fields.glb import glb_scene

    path = Path(rec(FACE).save_glb(tmp_path / "f.glb")[0])
    scene = glb_scene(path)
    assert {node["name"] for node in scene["nodes"]} == {"f", "skin", "left_eyeball", "right_eyeball"}
    for mesh in scene["meshes"]:
        assert set(mesh["primitives"][0]["attributes"]) == {"POSITION", "NORMAL", "COLOR_0", "TEXCOORD_0"}
    limits = scene["accessors"][scene["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    high = np.subtract(limits["max"], limits["min"])
    assert high[1] == high.max(), "a head is higher than wide and deep: y is up"
