"""Seconds and bytes of each data step at two sizes, for the dry run of the paper's experiment in `fields.costs`.

Usage: FIELDS_TEST_DATA=DIR python evidence/measure_paper_costs.py OUT.json
Processor seconds of one process with one thread, so that they can be divided by cores; real scan and photograph sizes.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from fields.config import PrepareConfig, ScanConfig
from fields.data.prepare import Shard, do_shard
from fields.data.scanfiles import read_landmarks, read_scan
from fields.head.flame import Head
from fields.scans.labels import crop_item
from fields.workers import one_thread

DATA = Path(os.environ["FIELDS_TEST_DATA"])


def peak_memory():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def scan_item(k=0):
    scan, points = DATA / "scan/scan.obj", DATA / "scan/scan_lmks.npy"
    return SimpleNamespace(
        id=f"bp4d/F001/T1/{k:04d}",
        scan=scan,
        landmarks3d=points,
        read_scan=lambda: read_scan(scan),
        read_landmarks3d=lambda: read_landmarks(points),
    )


def measure_crops(count, folder):
    begin, size = time.process_time(), 0
    for k in range(count):
        path = folder / f"{k}.npz"
        crop_item(scan_item(k), ScanConfig()).save(path, 1e-5)
        size += path.stat().st_size
    return {"count": count, "seconds": time.process_time() - begin, "bytes": size, "peak_GiB": peak_memory()}


def measure_fits(count):
    from fields.scans.fit import as_model, fit_scan, fit_shape
    from fields.scans.surface import at_shape

    config = ScanConfig(max_points=0)
    scan = crop_item(scan_item(), config)
    model = as_model(Head.load(DATA / "head/generic_model.pkl"), config, True)
    shape, _ = fit_shape(model, [(scan.points, scan.landmarks)] * 2, scan.which, config, check=False)
    model = at_shape(model, shape)
    rng, begin = np.random.default_rng(0), time.process_time()
    for _ in range(count):
        noisy = scan.points + rng.normal(size=scan.points.shape).astype(np.float32) * 2e-4
        fit_scan(model, noisy, scan.landmarks, scan.which, config, check=False)
    seconds = time.process_time() - begin
    return {"count": count, "seconds": seconds, "points": len(scan.points), "peak_GiB": peak_memory()}


def measure_pictures(count, folder, height=1040, width=1392):
    """A portrait in the middle of a picture of a dataset's size (BP4D's by default), as a JPEG file."""
    files = sorted((DATA / "portraits").glob("*.jpg"))[:count]
    for k, file in enumerate(files):
        side = np.asarray(Image.open(file).convert("RGB").resize((height, height)))
        wide = np.pad(side, ((0, 0), ((width - height) // 2,) * 2, (0, 0)), mode="edge")
        Image.fromarray(wide).save(folder / f"{k:04d}.jpg", quality=92)
    config = PrepareConfig(cache_size=374, store="jpeg", quality=85)
    samples = tuple((str(folder / f"{k:04d}.jpg"), None) for k in range(len(files)))
    (folder / "shards").mkdir()
    begin = time.process_time()
    _, n, found = do_shard(Shard(0, 0, samples, str(folder / "shards"), str(folder / "0.npz"), config))
    seconds = time.process_time() - begin
    size = (folder / "shards/000000.tar").stat().st_size
    return {"count": n, "faces": found, "seconds": seconds, "bytes": size, "peak_GiB": peak_memory()}


def main(out):
    steps = {"crop_scans": [], "fit_scans": [], "prepare": []}
    with one_thread("cv2", "numba", "torch"):
        measure_fits(1)  # compiled once, not measured
        for small, large in ((6, 24),):
            for count in (small, large):
                with tempfile.TemporaryDirectory() as name:
                    steps["crop_scans"].append(measure_crops(count, Path(name)))
                steps["fit_scans"].append(measure_fits(count // 2))
        with tempfile.TemporaryDirectory() as name:
            measure_pictures(2, Path(name))  # the detector is loaded
        for count in (20, 80):
            with tempfile.TemporaryDirectory() as name:
                steps["prepare"].append(measure_pictures(count, Path(name)))
    sizes = {"bp4d": (1040, 1392), "affectnet": (224, 224), "lrw": (256, 256), "ffhq": (1024, 1024)}
    bytes_of = {}
    for name, (height, width) in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_pictures(40, Path(folder), height, width)
            bytes_of[name] = round(measured["bytes"] / measured["count"])
    result = {"steps": steps, "bytes_of_a_crop": bytes_of}
    for name, (small, large) in steps.items():
        each = small["seconds"] / small["count"]
        result[name] = {
            "seconds_each": round(large["seconds"] / large["count"], 4),
            "bytes_each": round(large.get("bytes", 0) / large["count"]),
            "small_size_predicts_large_within": round(abs(each * large["count"] / large["seconds"] - 1), 3),
        }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = Head.load(DATA / "head/generic_model.pkl").sha256
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit, "head_sha256": head}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
