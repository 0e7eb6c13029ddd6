"""Sixty kinds of bad input through the command line: one sentence each, no traceback, the right exit code, and everything else done."""

import csv
import io
import os
import pickle
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from typer.testing import CliRunner

from fields import Head
from fields.cli import app, sentence
from fields.config import NetworkConfig
from fields.models.fields import FieldsModel, save_tensors

runner = CliRunner()
ASTRONAUT = Image.fromarray(skimage.data.astronaut()[20:220, 120:330])


def say(*arguments):
    """Run a command in process; return exit code, output, and every complaint as the user would read it."""
    result = runner.invoke(app, [str(a) for a in arguments])
    error = "" if result.exception is None or isinstance(result.exception, SystemExit) else sentence(result.exception)
    return result.exit_code, result.output, error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    FieldsModel(NetworkConfig(image_size=64), Head.load("open"), seed=0).save(path)
    return path


def jpeg(image=ASTRONAUT, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(image=ASTRONAUT, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed_png(width, height, data=b""):
    """A PNG whose header claims any size."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("../../escape.txt", b"0" * 1_000_000)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, ("echo unsafe > unsafe.txt",)


def video(frames, path):
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return Path(path).read_bytes()


FACE = np.asarray(ASTRONAUT.resize((208, 192)))
GREY = Image.new("RGB", (120, 120), "grey")
BAD = {  # name -> content, all in one folder beside good pictures
    "empty.jpg": lambda d: b"",
    "text.jpg": lambda d: b"this is a letter, not a picture",
    "page.png": lambda d: b"<html><img src=x></html>",
    "drawing.png": lambda d: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "archive.jpg": lambda d: archive(),
    "pickle.png": lambda d: pickle.dumps(Evil()),
    "random.webp": lambda d: np.random.default_rng(0).bytes(5000),
    "cut.jpg": lambda d: jpeg()[:2500],
    "cut.png": lambda d: png()[:3000],
    "header_only.jpg": lambda d: jpeg()[:20],
    "header_only.png": lambda d: png()[:8],
    "wrong_sum.png": lambda d: png()[:60] + b"\xff" + png()[61:],
    "no_face.jpg": lambda d: jpeg(GREY),
    "noise.png": lambda d: png(Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 90, 3), np.uint8))),
    "one_pixel.png": lambda d: png(Image.new("RGB", (1, 1))),
    "strip.png": lambda d: png(Image.new("RGB", (2000, 1))),
    "column.png": lambda d: png(Image.new("L", (1, 2000))),
    "bomb.png": lambda d: claimed_png(40000, 40000),
    "bomb_with_data.png": lambda d: claimed_png(30000, 30000, b"\0" * 50_000_000),
    "liar.png": lambda d: claimed_png(500, 500, b"\0" * 100),
    "no_size.png": lambda d: claimed_png(0, 10),
    "text_bomb.png": lambda d: png()[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"0" * 200_000_000)) + b"\0" * 40,
    "broken.tif": lambda d: b"II*\0" + b"\xff" * 200,
    "broken.gif": lambda d: b"GIF89a" + b"\xff" * 30,
    "broken.bmp": lambda d: b"BM" + b"\xff" * 60,
    "empty.mp4": lambda d: b"",
    "text.mp4": lambda d: b"this is no film" * 100,
    "picture.mp4": lambda d: b"\0\0\0\x18ftypmp42" + b"\0" * 500,
    "cut.mp4": lambda d: video([FACE] * 30, d / "whole.avi.mp4")[:3000],
    "no_face.mp4": lambda d: video([np.full((96, 96, 3), 90, np.uint8)] * 4, d / "n.mp4"),
    "broken.avi": lambda d: b"RIFF" + b"\xff" * 400,
    "broken.webm": lambda d: b"\x1aE\xdf\xa3" + b"\0" * 300,
}
ODD = {  # name -> content that is unusual and must work
    "sixteen_bit.png": lambda d: png(Image.fromarray((np.asarray(ASTRONAUT.convert("L")).astype(np.uint16) * 257))),
    "cmyk.jpg": lambda d: jpeg(ASTRONAUT.convert("CMYK")),
    "grey.jpg": lambda d: jpeg(ASTRONAUT.convert("L")),
    "palette.png": lambda d: png(ASTRONAUT.quantize(64)),
    "transparent.png": lambda d: png(ASTRONAUT.convert("RGBA")),
    "turned.jpg": lambda d: jpeg(ASTRONAUT.transpose(Image.Transpose.ROTATE_90), exif=_turned()),
    "UPPER.JPG": lambda d: jpeg(),
    "png_in_truth.jpg": lambda d: png(),
    "long_" + "x" * 230 + ".jpg": lambda d: jpeg(),
    "with space, comma and \u00e4.jpg": lambda d: jpeg(),
    "new\nline.jpg": lambda d: jpeg(),
}


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_folder_of_bad_files_stops_nothing(checkpoint, tmp_path):
    folder, spare, out = tmp_path / "in", tmp_path / "spare", tmp_path / "out"
    folder.mkdir(), spare.mkdir()
    for name, make in (BAD | ODD).items():
        (folder / name).write_bytes(make(spare))
    (folder / "missing.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "device.jpg").symlink_to("/dev/zero")
    bad = [*BAD, "missing.jpg", "loop.jpg", "folder.jpg", "pipe.png", "pipe.mp4", "device.jpg"]
    start = time.time()
    code, text, error = say("reconstruct", folder, "--out", out, "--checkpoint", checkpoint, "--no-panel", "--faces", 1)
    assert error == "" and code == 2 and "Traceback" not in text and "fault of fields" not in text, (code, error, text)
    complaints = [line for line in text.splitlines() if line.startswith("  not done: ")]
    for name in bad:
        mine = [c for c in complaints if f"/{name}" in c]
        assert len(mine) == 1 or name == "cut.mp4", (name, mine)
    assert len(complaints) <= len(bad), complaints
    made = {p.stem for p in out.glob("*.npz")}
    for name in ODD:
        stem = "".join(c if c.isprintable() else "_" for c in Path(name).stem)[:115]
        assert any(m.startswith(stem) for m in made), (name, made)
    assert not list(out.glob(".*")), "no half file stays"
    assert not Path("unsafe.txt").exists() and not (tmp_path / "escape.txt").exists()
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == made
    assert time.time() - start < 120


def test_one_broken_file_in_a_hundred(checkpoint, tmp_path):
    for k in range(24):
        (tmp_path / f"{k:03d}.jpg").write_bytes(jpeg())
    (tmp_path / "013.jpg").write_bytes(jpeg()[:500])
    code, text, error = say(
        "reconstruct", tmp_path, "--out", tmp_path / "out", "--checkpoint", checkpoint, "--no-panel"
    )
    assert (code, error) == (2, "") and "23 faces" in text and text.count("not done") == 1 and "013.jpg" in text


WRONG = [  # arguments, what is said; {d} is a folder with the files that `material` makes
    (["reconstruct", "{d}/none.jpg", "--out", "{d}/o"], "none.jpg"),
    (["reconstruct", "{d}/hollow", "--out", "{d}/o"], "holds no image"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/a.jpg"], "a.jpg"),
    (["reconstruct", "{d}/a.jpg", "--out", "/proc/nothing"], "/proc/nothing"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/none.safetensors"], "no checkpoint"),
    (
        ["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/text.safetensors"],
        "not a complete safetensors",
    ),
    (
        ["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/cut.safetensors"],
        "not a complete safetensors",
    ),
    (
        ["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/other.safetensors"],
        "no checkpoint of FIELDS",
    ),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/foreign.safetensors"], "not interchangeable"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}/evil.pt"], "not a PyTorch file"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--checkpoint", "{d}"], "no checkpoint"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--head", "{d}/evil.pt"], "evil.pt"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--head", "{d}/bomb.npz"], "bomb.npz"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--head", "{d}/empty"], "empty"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--head", "{d}"], "folder"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--device", "toaster"], "toaster"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--device", "meta"], "meta"),
    (["reconstruct", "{d}/a.jpg", "--out", "{d}/o", "--faces", "0"], "faces"),
    (["reconstruct", "{d}/a.jpg"], "--out"),
    (["reconstruct", "--out", "{d}/o"], "INPUT"),
    (["reconstruct", "{d}/grey.jpg", "--out", "{d}/o", "--checkpoint", "{m}"], "no face"),
    (["reconstruct", "x" * 5000, "--out", "{d}/o"], "check the path"),
    (["transfer", "{d}/a.jpg", "{d}/grey.jpg", "--out", "{d}/o", "--checkpoint", "{m}"], "second picture"),
    (["transfer", "{d}/a.jpg", "{d}/none.jpg", "--out", "{d}/o", "--checkpoint", "{m}"], "none.jpg"),
    (["inspect", "{d}/none.npz"], "none.npz"),
    (["inspect", "{d}/bomb.npz"], "bomb.npz"),
    (["inspect", "{d}/evil.pkl"], "evil.pkl"),
    (["inspect", "{d}/deep.json"], "deep.json"),
    (["inspect", "{d}/empty"], "empty"),
    (["inspect", "{d}/bad.glb"], "bad.glb"),
    (["inspect", "{d}/far.obj"], "far.obj"),
    (["inspect", "{d}/bomb.ply"], "bomb.ply"),
    (["fit-scan", "{d}/far.obj", "--landmarks", "{d}/marks.npy", "--out", "{d}/o"], "far.obj"),
    (["fit-scan", "{d}/nan.obj", "--landmarks", "{d}/marks.npy", "--out", "{d}/o"], "nan.obj"),
    (["fit-scan", "{d}/bomb.ply", "--landmarks", "{d}/marks.npy", "--out", "{d}/o"], "bomb.ply"),
    (["fit-scan", "{d}/good.obj", "--landmarks", "{d}/evil.npy", "--out", "{d}/o"], "evil.npy"),
    (["fit-scan", "{d}/good.obj", "--landmarks", "{d}/seven.npy", "--out", "{d}/o"], "7 landmarks"),
    (["fit-scan", "{d}/good.obj", "--landmarks", "{d}/marks.npy", "--unit", "inch", "--out", "{d}/o"], "inch"),
    (["chain", "--profile", "gigantic"], "choose one of"),
    (["chain", "--set", "train.steps=many"], "train.steps"),
    (["chain", "--from", "nowhere", "--run", "{d}/run"], "nowhere"),
    (["prepare", "../bp4d", "--root", "{d}", "--out", "{d}/o"], "bp4d"),
    (["prepare", "affectnet", "--root", "{d}", "--out", "{d}/o"], "affectnet"),
    (["bench", "--out", "{d}/b.json", "--only", "nothing"], "nothing"),
    (["dance"], "dance"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory, checkpoint):
    d = tmp_path_factory.mktemp("material")
    write = lambda name, data: (d / name).write_bytes(data)
    (d / "hollow").mkdir()
    write("a.jpg", jpeg()), write("grey.jpg", jpeg(GREY)), write("empty", b"")
    write("text.safetensors", b"not a checkpoint")
    write("cut.safetensors", checkpoint.read_bytes()[:200_000])
    import torch

    save_tensors(d / "other.safetensors", {"a": torch.zeros(2)}, {})
    head = Head.load("open")
    head.sha256, head.name = "0" * 64, "another"
    FieldsModel(NetworkConfig(image_size=64), head, seed=0).save(d / "foreign.safetensors")
    for name in ("evil.pt", "evil.pkl"):
        write(name, pickle.dumps(Evil()))
    np.save(d / "evil.npy", np.array([Evil()], object), allow_pickle=True)
    with zipfile.ZipFile(d / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 26,)})
        with z.open("template.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(512):
                file.write(bytes(1 << 20))
    write("deep.json", b"[" * 200_000)
    write("bad.glb", struct.pack("<4sIIII", b"glTF", 2, 0xFFFFFFF0, 0xFFFFFF00, 0x4E4F534A) + b"{" * 40)
    write("good.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    write("far.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 999999999\n")
    write("nan.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    write(
        "bomb.ply",
        b"ply\nformat binary_little_endian 1.0\nelement vertex 4000000000\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
        + b"\0" * 24,
    )
    np.save(d / "marks.npy", np.random.default_rng(0).normal(size=(51, 3)))
    np.save(d / "seven.npy", np.ones((7, 3)) + np.arange(7)[:, None])
    return d


@pytest.mark.parametrize("arguments, said", WRONG, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_one_sentence(arguments, said, material, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "bench":
        pytest.importorskip("fields.bench")
    filled = [a.format(d=material, m=checkpoint) for a in arguments]
    if (
        arguments[0] == "reconstruct"
        and "--checkpoint" not in arguments
        and "--head" not in arguments
        and "--device" not in arguments
    ):
        filled += ["--checkpoint", str(checkpoint)]
    start = time.time()
    code, text, error = say(*filled)
    spoken = text + error
    assert code not in (0, None) and said in spoken and "Traceback" not in spoken and "fault of fields" not in spoken, (
        code,
        spoken,
    )
    assert "\n" not in error and 10 < len(error) < 700 or code == 2 or "not done" in text, spoken
    assert time.time() - start < 30
    assert not list(tmp_path.rglob("unsafe.txt"))


def test_there_are_sixty():
    assert len(BAD) + len(ODD) + len(WRONG) + 6 >= 60


def test_manifest_with_a_way_out(tmp_path):
    """A manifest cannot point outside the dataset, and YAML cannot make objects."""
    from fields.manifests import manifest_folder, parse_manifest

    text = (manifest_folder() / "bp4d.yaml").read_text()
    for bad in (
        text.replace("folder: bp4d", "folder: ../../etc"),
        "name: !!python/object/apply:os.system ['echo unsafe']",
        "a: &a [*a]",
        "x: [" * 5000,
    ):
        with pytest.raises((ValueError, RecursionError)):
            parse_manifest(bad, tmp_path / "bp4d.yaml")


def test_interrupt_and_debug(monkeypatch, capsys):
    import fields.cli as cli

    for error, code in ((KeyboardInterrupt(), 130), (ValueError("two\nlines"), 1)):

        def stop(error=error):
            raise error

        monkeypatch.setattr(cli, "app", stop)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_without_rights_is_one_sentence(tmp_path):
    """A folder that may not be entered is named and the good picture beside it is done; an output folder that may not be written is one sentence."""
    import shutil, subprocess, sys

    obey = (
        ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    )  # root who obeys rights
    shut, opened, out = tmp_path / "shut", tmp_path / "opened", tmp_path / "out"
    for folder in (shut, opened):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(jpeg())
    shut.chmod(0)
    fails = lambda *command: bool(subprocess.run([*obey, *command], capture_output=True).returncode)
    if obey and (not shutil.which("setpriv") or fails("true") or not fails("ls", shut)):
        pytest.skip("root obeys no rights here")

    def run(*arguments):
        code = "from fields.cli import main; main()"
        return subprocess.run(
            [*obey, sys.executable, "-c", code, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )

    try:
        done = run("reconstruct", shut, opened, "--no-panel", "--out", out)
        assert (
            done.returncode == 2
            and done.stdout.count("not done") == 1
            and "shut" in done.stdout
            and "may not be read" in done.stdout
        ), done.stdout
        assert "Traceback" not in done.stderr and list(out.glob("a*.obj")), done.stderr
        done = run("reconstruct", opened, "--no-panel", "--out", shut / "out")
        assert done.returncode == 1 and "shut" in done.stderr and "Traceback" not in done.stderr, done.stderr
    finally:
        shut.chmod(0o700)
