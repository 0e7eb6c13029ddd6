"""Tiny copies of the six datasets in their official layouts, and official-format files: what a laboratory has.

The pictures come from the demo world's twins and are brought to the official sizes; `twin.json` is left out, so nothing
tells the readers that these are twins. The oddities are those that users of the real data report.
"""

import csv
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

WORLD = {
    "world.image_size": 160,
    "world.bp4d_subjects": 6,
    "world.bp4d_frames": 4,
    "world.affectnet_train": 21,
    "world.affectnet_heldout": 1,
    "world.celeba_identities": 2,
    "world.celeba_images": 2,
    "world.ffhq_images": 3,
    "world.lrw_clips": 2,
    "world.lrw_frames": 4,
    "world.mead_clips": 2,
    "world.mead_frames": 4,
    "world.identity_identities": 2,
    "world.identity_images": 1,
}


def twins(folder):
    """Write the demo world from which the copies are made."""
    from fields.config import load_profile, override
    from fields.data.twins import build_world

    config = override(load_profile("smoke"), WORLD)
    build_world(folder / "world", folder / "truth", config.world, workers=1)
    return folder / "world"


def resized(source, target, size, quality=92):
    """Copy a picture at another size (width, height); what its shape leaves free is continued from its edges."""
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(source).convert("RGB")
    side = min(size)
    pixels = np.asarray(picture.resize((side, side), Image.LANCZOS))
    across, down = size[0] - side, size[1] - side
    pad = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    Image.fromarray(np.pad(pixels, pad, mode="edge")).save(target, quality=quality)


def copy_bp4d(world, out):
    """Sequences with mixed padding, a lost picture, a missing scan, both kinds of landmark files, and scans from 1."""
    from fields.data.scanfiles import read_landmarks

    base = world / "bp4d"
    for number, person in enumerate(sorted(p.name for p in (base / "Sequences").iterdir())):
        pictures = sorted((base / "Sequences" / person).rglob("*.jpg"), key=lambda p: (p.parent.name, int(p.stem)))
        scans = sorted((base / "Scans" / person).rglob("*.*"), key=lambda p: (p.parent.name, int(p.stem)))
        scans = [p for p in scans if p.suffix in (".obj", ".ply", ".wrl")]
        points = sorted((base / "Landmarks3D" / person).rglob("*.*"), key=lambda p: (p.parent.name, int(p.stem)))
        assert len(pictures) == len(scans) == len(points)
        width = (4, 3, 2)[number % 3]
        for k, (picture, scan, landmarks) in enumerate(zip(pictures, scans, points)):
            if k == 2:
                continue  # a lost frame: no picture and no scan, but the landmark file of the sequence counts it
            resized(picture, out / "bp4d/Sequences" / person / "T1" / f"{k:0{width}d}.jpg", (1392, 1040))
            if not (k == 1 and number == 0):  # the first subject lacks one scan
                place = out / "bp4d/Scans" / person / "T1" / f"{k + 1:04d}{scan.suffix}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(scan, place)
            if number % 2:  # one file a frame
                place = out / "bp4d/Landmarks3D" / person / "T1" / f"{k + 1:04d}{landmarks.suffix}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(landmarks, place)
        if number % 2 == 0:  # one file a sequence, all frames in it
            place = out / "bp4d/Landmarks3D" / f"{person}_T1.npy"
            place.parent.mkdir(parents=True, exist_ok=True)
            np.save(place, np.stack([read_landmarks(p) for p in points]))


def copy_affectnet(world, out, release):
    """The later release (npy files, numbers as text, with contempt) or the one of 2017 (csv)."""
    base = world / "affectnet"
    rows = {"train": [], "val": []}
    for split in rows:
        for picture in sorted((base / f"{split}_set/images").iterdir(), key=lambda p: int(p.stem)):
            notes = base / f"{split}_set/annotations"
            kinds = ("exp", "val", "aro")
            values = [np.load(notes / f"{picture.stem}_{kind}.npy").reshape(-1)[0] for kind in kinds]
            rows[split].append((picture, [float(v) for v in values]))
        rows[split].append((picture, [7.0, 0.0, 0.0]))  # contempt: left out by rule
    for split, samples in rows.items():
        for number, (picture, values) in enumerate(samples):
            if release == "later":
                folder = out / f"affectnet/{split}_set"
                resized(picture, folder / "images" / f"{number}.jpg", (224, 224))
                (folder / "annotations").mkdir(exist_ok=True)
                for kind, value in zip(("exp", "val", "aro"), values):
                    text = np.array(f"{value:g}") if kind == "exp" else np.array(f"{value:.6f}")
                    np.save(folder / "annotations" / f"{number}_{kind}.npy", text)
                np.save(folder / "annotations" / f"{number}_lnd.npy", np.zeros(136))
            else:
                name = f"{number % 3 + 1}/{split}{number:05x}.jpg"
                resized(picture, out / "affectnet/Manually_Annotated/Manually_Annotated_Images" / name, (512, 400))
    if release != "later":
        from fields.data.readers import AFFECTNET_COLUMNS

        for split, file in (("train", "training"), ("val", "validation")):
            with open(out / "affectnet" / f"{file}.csv", "w", newline="") as handle:
                writer = csv.writer(handle)
                if split == "train":  # the published training list has a header, the validation list has none
                    writer.writerow(AFFECTNET_COLUMNS)
                for number, (_, values) in enumerate(rows[split]):
                    name = f"{number % 3 + 1}/{split}{number:05x}.jpg"
                    writer.writerow([name, 0, 0, 400, 400, "0;0", int(values[0]), *values[1:]])


def copy_photographs(world, out):
    """CelebA in the wild with its lists, and FFHQ's 1024 px files with its json file."""
    for picture in sorted((world / "celeba").rglob("*.jpg")):
        place = picture.relative_to(world / "celeba")
        resized(picture, out / "celeba" / place, (409, 687))
    for note in (world / "celeba").rglob("*.txt"):
        shutil.copy(note, out / "celeba" / note.relative_to(world / "celeba"))
    for picture in sorted((world / "ffhq").rglob("*.png")):
        resized(picture, out / "ffhq" / picture.relative_to(world / "ffhq"), (1024, 1024))
    for note in (world / "ffhq").glob("ffhq*.json"):
        shutil.copy(note, out / "ffhq" / note.name)


def copy_clips(world, out):
    """LRW at 256 px, 29 frames and 25 a second; MEAD at 1920 x 1080 and 30 a second."""
    import cv2

    from fields.media import read_frames

    for name, size, rate in (("lrw", (256, 256), 25), ("mead", (1920, 1080), 30)):
        for source in sorted((world / name).rglob("*")):
            target = out / name / source.relative_to(world / name)
            if source.name == "twin.json" or source.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix != ".mp4":
                shutil.copy(source, target)
                continue
            frames = read_frames(source, list(range(4)))
            writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            side = min(size)
            for k in range(29 if name == "lrw" else 8):
                frame = cv2.resize(frames[min(k, 3)][..., ::-1], (side, side))
                across = (size[0] - side) // 2
                writer.write(cv2.copyMakeBorder(frame, 0, 0, across, size[0] - side - across, cv2.BORDER_REPLICATE))
            writer.release()


def official_head(folder, data):
    """`generic_model.pkl` with exactly the files that FLAME, SMIRK, TEASER and MICA distribute: no 83 landmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "generic_model.pkl": "generic_model.pkl",
        "landmark_embedding.npy": "landmark_embedding_orig_torch.npy",
        "mediapipe_landmark_embedding.npz": "mediapipe_landmark_embedding.npz",
        "203_landmark_embeding_new.npz": "203_landmark_embedding.npz",
        "l_eyelid.npy": "l_eyelid.npy",
        "r_eyelid.npy": "r_eyelid.npy",
    }
    for name, source in names.items():
        os.symlink(Path(data) / "head" / source, folder / name)
    with np.load(Path(data) / "head" / "FLAME_masks.npz") as masks, open(folder / "FLAME_masks.pkl", "wb") as file:
        pickle.dump({name: masks[name] for name in masks.files}, file, protocol=2)
    return folder / "generic_model.pkl"


def official_weights(folder, names=("mica", "vgg16", "small", "large", "teaser")):
    """Networks of other groups with the published names and shapes, and random numbers in them."""
    import torch
    from test_models import fabricate, mica_shapes, official_shapes, timm_shapes

    from fields.models.checkpoints import vgg16_shapes

    folder.mkdir(parents=True, exist_ok=True)
    arcface, regressor = mica_shapes()
    files = {
        "mica": ("mica.tar", lambda: {"arcface": fabricate(arcface), "flameModel": fabricate(regressor)}),
        "vgg16": ("vgg16-397923af.pth", lambda: fabricate(vgg16_shapes())),
        "small": ("tf_mobilenetv3_small_minimal_100.pth", lambda: fabricate(timm_shapes("small"))),
        "large": ("tf_mobilenetv3_large_minimal_100.pth", lambda: fabricate(timm_shapes("large"))),
        "teaser": ("TEASER.pt", lambda: fabricate(official_shapes("teaser"))),
    }
    for name in names:
        file, make = files[name]
        torch.save(make(), folder / file)


def make_rehearsal(folder, data, release="later", weights=("mica", "vgg16", "small", "large", "teaser")):
    """Write datasets, head and weights below a folder; return the settings that name them."""
    world = twins(folder)
    out = folder / "data"
    copy_bp4d(world, out)
    copy_affectnet(world, out, release)
    copy_photographs(world, out)
    copy_clips(world, out)
    assert not list(out.rglob("twin.json"))
    head = official_head(folder / "FLAME2020", data)
    official_weights(folder / "weights", weights)
    return [f"head={head}", f"data={out}", f"assets={folder / 'weights'}", "allow_unknown_weights=true"]


if __name__ == "__main__":
    import sys

    print(json.dumps(make_rehearsal(Path(sys.argv[1]), os.environ["FIELDS_TEST_DATA"])))
