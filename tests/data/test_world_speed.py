"How fast the demo world is written and its faces are found, at demo size; kept in evidence/world_speed.json."

import json
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_images_and_scans_a_second(tmp_path, monkeypatch):
    "Images and clips with detection and cropping; scans, with their photographs, apart."
    from fields.config import load_profile
    from fields.data import twins
    from fields.data.prepare import prepare

    config, workers, all_units = load_profile("demo"), os.cpu_count() or 1, twins.units
    scanned = ("bp4d", "identity")

    def timed(kinds):
        monkeypatch.setattr(twins, "units", lambda c: [u for u in all_units(c) if u[0] in kinds])
        start, out = time.perf_counter(), tmp_path / kinds[0]
        counts = twins.build_world(out, tmp_path / f"truth_{kinds[0]}", config.world, workers)
        return counts, time.perf_counter() - start, out

    counts, writing, out = timed(("affectnet", "celeba", "ffhq", "lrw", "mead"))
    start = time.perf_counter()
    for name in counts:
        assert (
            prepare(name, out, tmp_path / "crops", config.prepare, workers, progress=False)["faces"]
            > 0.9 * counts[name]
        )
    finding, images = time.perf_counter() - start, sum(counts.values())
    scans, scanning, _ = timed(scanned)
    found = {
        "images": images,
        "writing_seconds": round(writing, 1),
        "detecting_and_cropping_seconds": round(finding, 1),
        "images_a_second": round(images / (writing + finding), 1),
        "scans": sum(scans.values()),
        "scanning_seconds": round(scanning, 1),
        "scans_a_second": round(config.world.bp4d_subjects * config.world.bp4d_frames / scanning, 1),
        "image_size": config.world.image_size,
        "cores": workers,
        "load": round(os.getloadavg()[0], 1),
        "what": "demo profile: stills as JPEG and PNG, clips as MP4, MediaPipe and crops; scans with the photographs of their frames and those of the identity set",
    }
    (ROOT / "evidence" / "world_speed.json").write_text(json.dumps(found, indent=1) + "\n")
    assert found["load"] > 3 or (found["images_a_second"] >= 60 and found["scans_a_second"] >= 5), found
