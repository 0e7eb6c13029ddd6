"""Readers: small fixtures in every official variant, and a table of what can be wrong with a folder."""

import json
import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fields.data.readers import inspect, open_dataset

RNG = np.random.default_rng(0)


def picture(path, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def video(path, frames=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (32, 32))
    for k in range(frames):
        writer.write(np.full((32, 32, 3), 40 * k, np.uint8))
    writer.release()


def twin(folder, name, **counts):
    extra = {"frames_per_clip": 5} if name in ("lrw", "mead") else {}
    (folder / "twin.json").write_text(json.dumps({"world": "test", "dataset": name, "counts": counts, **extra}))


def face83(scale=1.0):
    """83 points in BP4D's order with the proportions of a face, millimetres."""
    circle = lambda n, w, h: np.stack(
        [w * np.cos(np.arange(n) / n * 2 * np.pi), h * np.sin(np.arange(n) / n * 2 * np.pi), np.zeros(n)], 1
    )
    brow, eye = circle(10, 22, 4), circle(8, 15, 5)
    parts = [
        brow + [-32, 24, 5],
        brow + [32, 24, 5],
        eye + [-30, 0, 0],
        eye + [30, 0, 0],
        circle(12, 15, 12) + [0, -25, 20],
        circle(12, 25, 10) + [0, -60, 10],
        circle(8, 20, 5) + [0, -60, 9],
        circle(15, 60, 70) + [0, -30, -40],
    ]
    return np.concatenate(parts) * scale


def write_scan(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".obj":
        path.write_text("".join(f"v {x:.4f} {y:.4f} {z:.4f}\n" for x, y, z in points) + "f 1 2 3\n")
    elif path.suffix == ".ply":
        head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
        path.write_bytes(head.encode() + points.astype("<f4").tobytes())
    else:
        path.write_text(
            "#VRML V1.0 ascii\nSeparator { Coordinate3 { point [ "
            + ", ".join(f"{x} {y} {z}" for x, y, z in points)
            + " ] } }\n"
        )


def write_landmarks(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bnd":
        path.write_text("".join(f"{k} {x:.5f} {y:.5f} {z:.5f}\n" for k, (x, y, z) in enumerate(points, 1)))
    elif path.suffix == ".npy":
        np.save(path, points)
    elif path.suffix == ".mat":
        savemat(path, {"lmks": points})
    else:
        np.savetxt(path, points)


def make_bp4d(folder, scan=".obj", marks=".bnd", widths=(4, 3, 2), offset=0, scans="Scans", landmarks="Landmarks3D"):
    for subject in ("F001", "F014", "F010"):
        for number in range(3):
            name = str(number).zfill(widths[number])
            picture(folder / "Sequences" / subject / "T1" / f"{name}.jpg")
            write_scan(folder / scans / subject / "T1" / f"{number + offset:03d}{scan}", face83())
            write_landmarks(folder / landmarks / subject / "T1" / f"{number + offset:03d}{marks}", face83())
    twin(folder, "bp4d", train=3, val=3, test=3)


def make_affectnet(folder, text=True):
    for split, count in (("train_set", 9), ("val_set", 4)):
        for k in range(count):
            picture(folder / split / "images" / f"{k}.jpg")
            notes = folder / split / "annotations"
            notes.mkdir(exist_ok=True)
            values = {"exp": k % 8, "val": 0.25, "aro": -0.5}
            for kind, value in values.items():
                np.save(notes / f"{k}_{kind}.npy", np.array(str(value) if text else value))
            np.save(notes / f"{k}_lnd.npy", np.zeros(136))
    twin(folder, "affectnet", train=8, val=4)


def make_affectnet_csv(folder, header=True):
    columns = (
        "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal".split(
            ","
        )
    )
    for name, count in (("training", 12), ("validation", 2)):
        rows = []
        for k in range(count):
            path = f"{k % 3}/{name}{k}.jpg"
            picture(folder / "Manually_Annotated" / "Manually_Annotated_Images" / path)
            value = "-2" if k in (9, 10) else "0.5"
            rows.append([path, "0", "0", "9", "9", "1;2", str(k if k < 11 else 0), value if k < 11 else "-2", value])
        lines = ([columns] if header or name == "training" else []) + rows
        (folder / f"{name}.csv").write_text("\n".join(",".join(r) for r in lines) + "\n")
    twin(folder, "affectnet", train=7, val=2)


def make_celeba(folder):
    for k in range(1, 7):
        picture(folder / "img_celeba" / f"{k:06d}.jpg")
    (folder / "identity_CelebA.txt").write_text("".join(f"{k:06d}.jpg {2880 + k % 2}\n" for k in range(1, 7)))
    (folder / "list_eval_partition.txt").write_text("".join(f"{k:06d}.jpg {max(0, k - 4)}\n" for k in range(1, 7)))
    twin(folder, "celeba", train=4, val=1, test=1)


def make_ffhq(folder):
    entries = {}
    for k in (0, 1, 2, 1000, 1001):
        path = f"images1024x1024/{k // 1000 * 1000:05d}/{k:05d}.png"
        picture(folder / path)
        entries[str(k)] = {
            "category": "training" if k < 1001 else "validation",
            "image": {"file_path": path, "pixel_size": [1024, 1024]},
        }
    (folder / "ffhq-dataset-v2.json").write_text(json.dumps(entries))
    twin(folder, "ffhq", train=4, val=1)


def make_lrw(folder):
    for split in ("train", "val", "test"):
        path = folder / "lipread_mp4" / "ABOUT" / split / "ABOUT_00001.mp4"
        video(path)
        path.with_suffix(".txt").write_text("Disk reference: 1\nDuration: 0.2 seconds\n")
    twin(folder, "lrw", train=5, val=5, test=5)


def make_mead(folder):
    for person, view, emotion, level in (
        ("M003", "front", "happy", 1),
        ("W009", "left_30", "neutral", 1),
        ("M039", "down", "fear", 3),
        ("M040", "top", "sad", 2),
    ):
        video(folder / person / "video" / view / emotion / f"level_{level}" / "001.mp4")
    (folder / "M003" / "audio").mkdir()
    twin(folder, "mead", train=10, val=5, test=5)


def make_identity(folder):
    for k in range(3):
        for n in range(2):
            picture(folder / "images" / f"I{k:04d}" / f"{n:02d}.jpg")
        write_scan(folder / "scans" / f"I{k:04d}.ply", face83())
        write_landmarks(folder / "landmarks" / f"I{k:04d}.npy", face83())
    (folder / "identities.csv").write_text(
        "id,split\n" + "".join(f"I{k:04d},{'val' if k == 2 else 'train'}\n" for k in range(3))
    )
    (folder / "labels.csv").write_text("image,emotion,valence,arousal\nI0001/00.jpg,3,0.5,\n")
    twin(folder, "identity", train=4, val=2)


MAKERS = {
    "bp4d": make_bp4d,
    "affectnet": make_affectnet,
    "affectnet_csv": make_affectnet_csv,
    "celeba": make_celeba,
    "ffhq": make_ffhq,
    "lrw": make_lrw,
    "mead": make_mead,
    "identity": make_identity,
}


def folder_of(root, kind):
    return root / ("standins/identity" if kind == "identity" else kind.split("_")[0])


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """One good folder of each kind, made once."""
    base = tmp_path_factory.mktemp("templates")
    for kind, make in MAKERS.items():
        folder = folder_of(base / kind, kind)
        folder.mkdir(parents=True)
        make(folder)
    return base


@pytest.mark.parametrize("kind", MAKERS)
def test_good_folder(templates, kind):
    data = open_dataset(kind.split("_")[0], templates / kind, strict=True)
    expected = json.loads((folder_of(templates / kind, kind) / "twin.json").read_text())["counts"]
    assert {k: v for k, v in data.counts.items() if v} == {k: v for k, v in expected.items() if v}
    assert data.found == len(data) + sum(data.dropped.values()) and data.faulty == 0
    assert len({i.id for i in data.items}) == len(data) and all(i.id.startswith(data.name + "/") for i in data.items)
    assert data.items[0].read_image().dtype == np.uint8 and data.items[-1].read_image().shape[2] == 3
    assert [i.id for i in open_dataset(data.name, templates / kind, check="full").items] == [i.id for i in data.items]
    assert json.dumps(data.report()) and data.manifest.title in inspect(data.name, templates / kind)


def test_bp4d_variants(tmp_path):
    for n, (scan, marks, widths, place) in enumerate(
        [
            (".obj", ".bnd", (4, 3, 2), "Scans"),
            (".ply", ".mat", (2, 2, 2), "3D"),
            (".wrl", ".npy", (3, 3, 4), "Meshes"),
            (".obj", ".txt", (4, 4, 4), "Sequences"),
        ]
    ):
        root = tmp_path / str(n)
        make_bp4d(
            root / "bp4d",
            scan,
            marks,
            widths,
            scans=place,
            landmarks="Sequences" if place == "Sequences" else "3DFeatures",
        )
        data = open_dataset("bp4d", root, strict=True)
        assert [i.id for i in data.items][:3] == [
            "bp4d/F001/T1/0000",
            "bp4d/F001/T1/0001",
            "bp4d/F001/T1/0002",
        ] and data.items[1].path.stem == "1".zfill(widths[1])
        assert {i.subject: i.split for i in data.items} == {"F001": "train", "F014": "val", "F010": "test"}
        item = data.items[2]
        np.testing.assert_allclose(item.read_landmarks3d(), face83(), atol=1e-4)
        np.testing.assert_allclose(item.read_scan().vertices, face83(), atol=1e-4)
        assert "unit mm" in inspect("bp4d", root) and "left +x, up +y, forward +z" in inspect("bp4d", root)


def test_bp4d_offset_and_sequence_file(tmp_path):
    make_bp4d(tmp_path / "bp4d", offset=1)
    shifted = open_dataset("bp4d", tmp_path)
    assert [p.message for p in shifted.problems if p.kind == "count"][0].endswith("scan_offset=1")
    assert open_dataset("bp4d", tmp_path, strict=True, scan_offset=1).items[2].scan.stem == "003"
    shutil.rmtree(tmp_path / "bp4d" / "Landmarks3D")
    for subject in ("F001", "F014", "F010"):
        (tmp_path / "bp4d" / "3DFeatures").mkdir(exist_ok=True)
        savemat(
            tmp_path / "bp4d" / "3DFeatures" / f"{subject}_T1.mat",
            {"fit": {"pts3d": np.stack([face83() + k for k in range(3)])}},
        )
    item = open_dataset("bp4d", tmp_path, strict=True, scan_offset=1).items[2]
    np.testing.assert_allclose(item.read_landmarks3d(), face83() + 2, atol=1e-6)


def test_bp4d_extra_subjects_only_in_twins(tmp_path):
    make_bp4d(tmp_path / "bp4d")
    picture(tmp_path / "bp4d/Sequences/X001/T2/0007.jpg")
    write_scan(tmp_path / "bp4d/Scans/X001/T2/0007.ply", face83())
    write_landmarks(tmp_path / "bp4d/Landmarks3D/X001/T2/0007.bnd", face83())
    assert [i.split for i in open_dataset("bp4d", tmp_path).items if i.subject == "X001"] == ["train"]
    (tmp_path / "bp4d/twin.json").unlink()
    data = open_dataset("bp4d", tmp_path)
    assert not [i for i in data.items if i.subject == "X001"] and any(
        "do not name this subject" in p.message for p in data.problems
    )


def test_affectnet_2017_without_header(tmp_path):
    make_affectnet_csv(tmp_path / "affectnet", header=False)
    data = open_dataset("affectnet", tmp_path, strict=True)
    assert data.dropped == {"contempt": 1, "none": 1, "uncertain": 1, "no face": 1, "no valence and arousal": 1}
    assert data.items[0].id.startswith("affectnet/train_set/") and data.items[1].valence == 0.5


def test_affectnet_numbers(tmp_path):
    make_affectnet(tmp_path / "affectnet", text=False)
    data = open_dataset("affectnet", tmp_path, strict=True)
    assert data.dropped == {"contempt": 1} and [i.emotion for i in data.split("train")] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert [i.id.split("/")[-1] for i in data.split("val")] == ["0", "1", "2", "3"]


def test_celeba_official_subfolders(tmp_path):
    make_celeba(tmp_path / "celeba")
    for name, place in (("img_celeba", "Img"), ("identity_CelebA.txt", "Anno"), ("list_eval_partition.txt", "Eval")):
        (tmp_path / "celeba" / place).mkdir()
        (tmp_path / "celeba" / name).rename(tmp_path / "celeba" / place / name)
    data = open_dataset("celeba", tmp_path, strict=True)
    assert data.counts == {"train": 4, "val": 1, "test": 1} and data.items[0].subject == "2881"


def test_official_counts_and_kept_frames(tmp_path):
    make_lrw(tmp_path / "lrw")
    (tmp_path / "lrw/twin.json").unlink()
    data = open_dataset("lrw", tmp_path)
    assert len(data) == 3 and {p.kind for p in data.problems} == {"count"}
    assert any("1 clips instead of 488766" in p.message for p in data.problems)
    assert [i.id for i in data.items] == [i.id for i in open_dataset("lrw", tmp_path).items]
    assert (
        len(open_dataset("lrw", tmp_path, keep_frames=0)) == 15
        and len(open_dataset("lrw", tmp_path, keep_frames=3)) == 9
    )


def test_identity_labels(templates):
    data = open_dataset("identity", templates / "identity")
    labelled = [i for i in data.items if i.emotion is not None]
    assert [(i.id, i.emotion, i.valence, i.arousal) for i in labelled] == [("identity/I0001/00", 3, 0.5, None)]
    assert data.items[0].read_landmarks3d().shape == (83, 3)


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong. First what makes a reader refuse the folder: (kind, what is done to it, part of the sentence).
def edit(path, text):
    return lambda f: (f / path).write_text(text)


def drop(path):
    return lambda f: shutil.rmtree(f / path) if (f / path).is_dir() else (f / path).unlink()


def move(path, new):
    return lambda f: ((f / new).parent.mkdir(parents=True, exist_ok=True), (f / path).rename(f / new))


def cut(path, keep=0.7):
    return lambda f: (f / path).write_bytes((f / path).read_bytes()[: int((f / path).stat().st_size * keep)])


def change(path, old, new):
    return lambda f: (f / path).write_text((f / path).read_text().replace(old, new, 1))


REFUSED = {
    "no folder": ("celeba", lambda f: shutil.rmtree(f), "there is no folder"),
    "bp4d without pictures": ("bp4d", drop("Sequences"), "rule layout.roles.images asks for Sequences"),
    "affectnet of neither release": (
        "affectnet",
        lambda f: [shutil.rmtree(f / s) for s in ("train_set", "val_set")],
        "rule layout.roles.train",
    ),
    "affectnet without annotations": ("affectnet", drop("train_set/annotations"), "annotations is missing"),
    "affectnet list without columns": (
        "affectnet_csv",
        change("training.csv", "expression", "emotion"),
        "has no column",
    ),
    "affectnet list empty": ("affectnet_csv", edit("training.csv", ""), "is empty"),
    "affectnet list without pictures": ("affectnet_csv", drop("Manually_Annotated"), "rule layout.roles.manual"),
    "celeba without identities": ("celeba", drop("identity_CelebA.txt"), "rule layout.roles.identities"),
    "ffhq json broken": ("ffhq", cut("ffhq-dataset-v2.json"), "is not FFHQ's json file"),
    "ffhq json of another kind": (
        "ffhq",
        edit("ffhq-dataset-v2.json", '{"0": {"file": 1}}'),
        "is not FFHQ's json file",
    ),
    "lrw without clips": ("lrw", drop("lipread_mp4"), "rule layout.roles.clips"),
    "identity list without split": (
        "identity",
        change("identities.csv", "split", "set"),
        "needs the columns id and split",
    ),
    "all samples gone": (
        "mead",
        lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()],
        "holds no sample that can be used",
    ),
    "twin not JSON": ("mead", edit("twin.json", "{"), "is not JSON"),
    "twin of another dataset": ("mead", change("twin.json", "mead", "lrw"), "belongs to 'lrw'"),
    "twin with an unknown key": (
        "mead",
        change("twin.json", '"world"', '"planet": 1, "world"'),
        "unknown key 'planet'",
    ),
    "twin without counts": ("mead", change("twin.json", "counts", "count"), "lacks world, dataset or counts"),
    "twin with odd counts": ("mead", change("twin.json", "10", '"ten"'), "counts that are not whole numbers"),
}

# Then what becomes a problem: (kind, what is done, kind of problem, part of its path, part of the message, samples lost).
IMAGE = "train_set/images/1.jpg"
CLIP = "lipread_mp4/ABOUT/train/ABOUT_00001.mp4"
PROBLEMS = {
    "picture cut off": ("affectnet", cut(IMAGE), "truncated", "images/1.jpg", "has no end", 1),
    "picture empty": ("affectnet", edit(IMAGE, ""), "truncated", "images/1.jpg", "is empty", 1),
    "picture is a web page": ("affectnet", edit(IMAGE, "<html>"), "corrupt", "images/1.jpg", "is no image", 1),
    "picture misnamed": (
        "affectnet",
        move(IMAGE, "train_set/images/one.jpg"),
        "misnamed",
        "one.jpg",
        "does not match",
        1,
    ),
    "picture of another format": (
        "affectnet",
        move(IMAGE, "train_set/images/1.tga"),
        "misnamed",
        "1.tga",
        "does not match",
        1,
    ),
    "picture gone": ("affectnet", drop(IMAGE), "missing", "images/1.jpg", "no picture", 1),
    "annotation gone": (
        "affectnet",
        drop("train_set/annotations/1_val.npy"),
        "missing",
        "1_val.npy",
        "is not there",
        1,
    ),
    "annotation corrupt": (
        "affectnet",
        edit("train_set/annotations/1_exp.npy", "??"),
        "corrupt",
        "1_exp.npy",
        "not a plain numpy value",
        1,
    ),
    "annotation pickled": (
        "affectnet",
        lambda f: (f / "train_set/annotations/1_exp.npy").write_bytes(pickle.dumps(1)),
        "corrupt",
        "1_exp.npy",
        "not a plain",
        1,
    ),
    "annotation no number": (
        "affectnet",
        lambda f: np.save(f / "train_set/annotations/1_exp.npy", np.array("happy")),
        "label",
        "images/1.jpg",
        "are no numbers",
        1,
    ),
    "class unknown": (
        "affectnet",
        lambda f: np.save(f / "train_set/annotations/1_exp.npy", np.array(12)),
        "label",
        "images/1.jpg",
        "class 12 does not exist",
        1,
    ),
    "class fractional": (
        "affectnet",
        lambda f: np.save(f / "train_set/annotations/1_exp.npy", np.array(1.5)),
        "label",
        "images/1.jpg",
        "1.5 does not exist",
        1,
    ),
    "valence out of range": (
        "affectnet",
        lambda f: np.save(f / "train_set/annotations/1_val.npy", np.array("1.7")),
        "label",
        "images/1.jpg",
        "outside of [-1,1]",
        1,
    ),
    "arousal not finite": (
        "affectnet",
        lambda f: np.save(f / "train_set/annotations/1_aro.npy", np.array(np.nan)),
        "label",
        "images/1.jpg",
        "outside of [-1,1]",
        1,
    ),
    "half of the release gone": ("affectnet", drop("val_set"), "missing", "val_set", "this half", 0),
    "list line cut off": (
        "affectnet_csv",
        change("training.csv", "0/training0.jpg,0,0,9,9,1;2,0,0.5,0.5", "0/training0.jpg,0,0"),
        "truncated",
        "training.csv line 2",
        "values, not 9",
        1,
    ),
    "list path leaves the folder": (
        "affectnet_csv",
        change("training.csv", "0/training0.jpg", "../training0.jpg"),
        "misnamed",
        "training.csv line 2",
        "no path of an image",
        1,
    ),
    "listed twice": (
        "affectnet_csv",
        change("training.csv", "1/training1.jpg", "0/training0.jpg"),
        "label",
        "training.csv line 3",
        "listed twice",
        1,
    ),
    "listed picture gone": (
        "affectnet_csv",
        drop("Manually_Annotated/Manually_Annotated_Images/0/training0.jpg"),
        "missing",
        "training0.jpg",
        "is not there",
        1,
    ),
    "identity unknown": (
        "celeba",
        change("identity_CelebA.txt", "000002.jpg 2880\n", ""),
        "label",
        "000002.jpg",
        "does not name this picture",
        1,
    ),
    "identity line garbled": (
        "celeba",
        change("identity_CelebA.txt", "000002.jpg 2880", "000002.jpg x"),
        "label",
        "identity_CelebA.txt line 2",
        "not a file name and a number",
        0,
    ),
    "named picture gone": ("celeba", drop("img_celeba/000003.jpg"), "missing", "000003.jpg", "names this picture", 1),
    "number too short": (
        "celeba",
        move("img_celeba/000003.jpg", "img_celeba/3.jpg"),
        "misnamed",
        "img_celeba/3.jpg",
        "does not match",
        1,
    ),
    "partition value": (
        "celeba",
        change("list_eval_partition.txt", "000003.jpg 0", "000003.jpg 7"),
        "label",
        "000003.jpg",
        "0, 1 or 2",
        1,
    ),
    "ffhq picture gone": (
        "ffhq",
        drop("images1024x1024/00000/00002.png"),
        "missing",
        "00002.png",
        "json file names",
        1,
    ),
    "ffhq picture not listed": (
        "ffhq",
        lambda f: picture(f / "images1024x1024/00000/00005.png"),
        "label",
        "00005.png",
        "does not name",
        1,
    ),
    "ffhq picture in the wrong folder": (
        "ffhq",
        move("images1024x1024/00000/00002.png", "images1024x1024/01000/00002.png"),
        "misnamed",
        "01000/00002.png",
        "folder 00000",
        1,
    ),
    "ffhq name differs": (
        "ffhq",
        change("ffhq-dataset-v2.json", "00000/00002.png", "00000/00002.jpg"),
        "misnamed",
        "00002.png",
        "calls it",
        1,
    ),
    "ffhq category": (
        "ffhq",
        change("ffhq-dataset-v2.json", "training", "holdout"),
        "label",
        "00000.png",
        "category",
        1,
    ),
    "ffhq png cut off": ("ffhq", cut("images1024x1024/00000/00001.png"), "truncated", "00001.png", "PNG has no end", 1),
    "ffhq without json": (
        "ffhq",
        drop("ffhq-dataset-v2.json"),
        "missing",
        "ffhq-dataset-v2.json",
        "picture numbers",
        0,
    ),
    "clip cut off": ("lrw", cut(CLIP), "truncated", "ABOUT_00001.mp4", "cut off", 5),
    "clip empty": ("lrw", edit(CLIP, ""), "truncated", "ABOUT_00001.mp4", "is empty", 5),
    "clip is text": (
        "lrw",
        edit(CLIP, "no video at all, but long enough"),
        "corrupt",
        "ABOUT_00001.mp4",
        "no mp4 video",
        5,
    ),
    "clip too short": ("lrw", lambda f: video(f / CLIP, 3), "count", "ABOUT_00001.mp4", "3 frames, not 5", 2),
    "clip misnamed": (
        "lrw",
        move(CLIP, "lipread_mp4/ABOUT/train/ABOVE_00001.mp4"),
        "misnamed",
        "ABOVE_00001.mp4",
        "does not match",
        None,
    ),
    "word in small letters": (
        "lrw",
        lambda f: (f / "lipread_mp4/about").mkdir(),
        "misnamed",
        "lipread_mp4/about",
        "does not match",
        0,
    ),
    "split unknown": (
        "lrw",
        lambda f: (f / "lipread_mp4/ABOUT/dev").mkdir(),
        "misnamed",
        "ABOUT/dev",
        "does not match",
        0,
    ),
    "text file gone": (
        "lrw",
        lambda f: (f / CLIP).with_suffix(".txt").unlink(),
        "missing",
        "ABOUT_00001.txt",
        "no text file",
        0,
    ),
    "text file without duration": (
        "lrw",
        lambda f: (f / CLIP).with_suffix(".txt").write_text("x"),
        "label",
        "ABOUT_00001.txt",
        "no duration",
        0,
    ),
    "actor misnamed": ("mead", move("M003", "actor3"), "misnamed", "actor3", "does not match", None),
    "view unknown": (
        "mead",
        move("M003/video/front", "M003/video/back"),
        "misnamed",
        "video/back",
        "does not match",
        None,
    ),
    "emotion unknown": (
        "mead",
        move("M003/video/front/happy", "M003/video/front/joy"),
        "misnamed",
        "front/joy",
        "does not match",
        None,
    ),
    "level unknown": (
        "mead",
        move("M003/video/front/happy/level_1", "M003/video/front/happy/level_4"),
        "misnamed",
        "happy/level_4",
        "does not match",
        None,
    ),
    "neutral at level 2": (
        "mead",
        lambda f: video(f / "W009/video/left_30/neutral/level_2/001.mp4"),
        "misnamed",
        "neutral/level_2",
        "does not match",
        0,
    ),
    "actor without videos": ("mead", drop("M003/video"), "missing", "M003/video", "no folder of videos", None),
    "clip without index": ("mead", cut("M003/video/front/happy/level_1/001.mp4", 0.05), "truncated", "001.mp4", "", 5),
    "subject unknown": (
        "bp4d",
        move("Sequences/F001", "Sequences/F099"),
        "misnamed",
        "Sequences/F099",
        "do not name this subject",
        3,
    ),
    "task unknown": ("bp4d", lambda f: (f / "Sequences/F001/T9").mkdir(), "misnamed", "F001/T9", "does not match", 0),
    "frame misnamed": (
        "bp4d",
        move("Sequences/F001/T1/001.jpg", "Sequences/F001/T1/one.jpg"),
        "misnamed",
        "one.jpg",
        "not a number",
        1,
    ),
    "frame number twice": (
        "bp4d",
        lambda f: picture(f / "Sequences/F001/T1/00001.jpg"),
        "misnamed",
        "T1/001.jpg",
        "same number",
        1,
    ),
    "frame cut off": ("bp4d", cut("Sequences/F001/T1/001.jpg"), "truncated", "T1/001.jpg", "has no end", 1),
    "scan gone": ("bp4d", drop("Scans/F001/T1/001.obj"), "missing", "Sequences/F001/T1/001.jpg", "no scan", 0),
    "scan empty": ("bp4d", edit("Scans/F001/T1/001.obj", ""), "truncated", "T1/001.obj", "is empty", 0),
    "scan landmarks gone": ("bp4d", drop("Landmarks3D/F001/T1/001.bnd"), "missing", "T1/001.obj", "no landmarks", 0),
    "scan without picture": (
        "bp4d",
        lambda f: write_scan(f / "Scans/F001/T1/077.obj", face83()),
        "missing",
        "T1/077.obj",
        "no picture",
        0,
    ),
    "twin with other counts": (
        "bp4d",
        change("twin.json", '"train": 3', '"train": 4'),
        "count",
        "train",
        "3 items instead of 4",
        0,
    ),
    "person without scan": ("identity", drop("scans/I0001.ply"), "missing", "I0001", "no scans file", 0),
    "person without pictures": ("identity", drop("images/I0001"), "missing", "I0001", "no pictures", 1),
    "person with an odd split": (
        "identity",
        change("identities.csv", "I0001,train", "I0001,dev"),
        "label",
        "I0001",
        "no valid split",
        1,
    ),
}


def test_the_table_is_long_enough():
    assert len(REFUSED) + len(PROBLEMS) >= 40


@pytest.mark.parametrize("case", REFUSED)
def test_refused(templates, tmp_path, case):
    kind, spoil, sentence = REFUSED[case]
    shutil.copytree(templates / kind, tmp_path, dirs_exist_ok=True)
    spoil(folder_of(tmp_path, kind))
    with pytest.raises(ValueError) as error:
        open_dataset(kind.split("_")[0], tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", PROBLEMS)
def test_problem(templates, tmp_path, case):
    kind, spoil, what, where, message, lost = PROBLEMS[case]
    name = kind.split("_")[0]
    good = open_dataset(name, templates / kind)
    shutil.copytree(templates / kind, tmp_path, dirs_exist_ok=True)
    spoil(folder_of(tmp_path, kind))
    data = open_dataset(name, tmp_path)
    hits = [p for p in data.problems if p.kind == what and where in p.path and message in p.message]
    assert hits, [str(p) for p in data.problems]
    if lost is not None:
        assert sum(p.lost for p in hits) == lost
    assert data.found == len(data) + sum(data.dropped.values()) + data.faulty
    assert len({i.id for i in data.items}) == len(data) <= len(good)
    if (
        lost
        and what != "misnamed"
        and case not in ("person without pictures", "person with an odd split", "ffhq picture not listed")
    ):
        assert len(data) == len(good) - lost and data.found == good.found
    with pytest.raises(ValueError) as error:
        open_dataset(name, tmp_path, strict=True)
    assert str(hits[0]) in str(error.value)


def test_deep_check_finds_what_the_quick_one_cannot(templates, tmp_path):
    shutil.copytree(templates / "ffhq", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ffhq/images1024x1024/00000/00001.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = bytes(60)
    path.write_bytes(data)
    assert not open_dataset("ffhq", tmp_path).problems
    assert [p.kind for p in open_dataset("ffhq", tmp_path, check="full").problems] == ["corrupt", "count"]
    with pytest.raises(ValueError, match="choose quick, full or none"):
        open_dataset("ffhq", tmp_path, check="deep")
    with pytest.raises(ValueError, match="there is no manifest"):
        open_dataset("imagenet", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(templates, tmp_path):
    shutil.copytree(templates / "celeba", tmp_path, dirs_exist_ok=True)
    path = Path(tmp_path) / "celeba/img_celeba/000001.jpg"
    path.chmod(0)
    assert [p.kind for p in open_dataset("celeba", tmp_path).problems][0] == "corrupt"
