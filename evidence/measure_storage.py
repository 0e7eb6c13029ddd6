"""Old and new storage of crops in one run: bytes an image, and images a second a core, for figures that the docs quote.

Usage: python evidence/measure_storage.py FOLDER_OF_PHOTOGRAPHS OUT.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fields.data.augment import augment, draw_plan
from fields.data.crop import hull_mask
from fields.data.packed import PackedImages, encode, write_shard
from fields.media import read_image

SIDE, BATCH, COUNT = 374, 64, 256


def photographs(folder):
    """Square crops of photographs, enlarged to the size of the paper's cached crops."""
    import cv2

    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".png"))[:COUNT]
    pictures = []
    for file in files:
        image = read_image(file)
        side = min(image.shape[:2])
        top, left = ((n - side) // 2 for n in image.shape[:2])
        pictures.append(cv2.resize(image[top : top + side, left : left + side], (SIDE, SIDE)))
    return pictures


def seconds_of(read, rows, repeats=3):
    """Return the median processor seconds of reading and augmenting a batch."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        crops = torch.from_numpy(np.ascontiguousarray(read(rows)))
        read_at = time.process_time()
        augment(crops, torch.zeros(len(rows), 325, 2), draw_plan(rows), 224)
        times.append((read_at - begin, time.process_time() - read_at))
    return np.median(times, axis=0)


def main(folder, out):
    torch.set_num_threads(1)
    pictures = photographs(folder)
    turn = np.linspace(0, 2 * np.pi, 478)
    points = np.repeat(np.stack([np.cos(turn), np.sin(turn)], 1)[None] * 0.5, len(pictures), 0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        raw = np.stack([np.dstack([p, hull_mask(q, SIDE)]) for p, q in zip(pictures, points)])
        np.save(base / "images.npy", raw)
        place = write_shard(base / "shards" / "000000.tar", 0, [encode(p) for p in pictures])
        np.save(base / "index.npy", np.c_[np.zeros((len(place), 1), np.int64), place])
        stores = {
            "raw": np.load(base / "images.npy", mmap_mode="r"),
            "jpeg": PackedImages(base, points, SIDE, threads=1),
        }
        sizes = {"raw": (base / "images.npy").stat().st_size, "jpeg": (base / "shards/000000.tar").stat().st_size}
        rows = rng.choice(len(pictures), BATCH)
        result = {}
        for store, images in stores.items():
            read, augmented = seconds_of(lambda r, images=images: images[np.sort(r)], rows)
            result[store] = {
                "bytes_per_image": round(sizes[store] / len(pictures)),
                "read_ms_per_64": round(1000 * read, 1),
                "augment_ms_per_64": round(1000 * augmented, 1),
                "images_per_second_per_core": round(BATCH / (read + augmented)),
            }
        sample = np.abs(stores["jpeg"][:32, ..., :3].astype(int) - raw[:32, ..., :3]).mean()
    result["mean_difference_of_256"] = round(float(sample), 2)
    result["cores_for_400_images_per_second"] = round(400 / result["jpeg"]["images_per_second_per_core"], 2)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit, "side": SIDE, "photographs": len(pictures)}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
