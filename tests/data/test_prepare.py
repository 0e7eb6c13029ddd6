"""Preparing crops: resumable, the same whatever the number of processes, and no sample lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fields.data.prepare as module
from fields.config import PrepareConfig
from fields.data.crop import Box, crop_image, face_box, from_crop
from fields.data.mesh import Face
from fields.data.prepare import CropStore, prepare, shards
from fields.data.readers import open_dataset
from fields.media import read_image

DATA = os.environ.get("FIELDS_TEST_DATA")
ROOT = Path(__file__).parents[2]


def make_ffhq(root, images):
    entries = {}
    for k, image in enumerate(images):
        path = root / "ffhq" / "images1024x1024" / "00000" / f"{k:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        entries[k] = {"category": "training", "image": {"file_path": f"images1024x1024/00000/{k:05d}.png"}}
    (root / "ffhq" / "ffhq-dataset-v2.json").write_text(json.dumps(entries))
    (root / "ffhq" / "twin.json").write_text(
        json.dumps({"world": "test", "dataset": "ffhq", "counts": {"train": len(images)}})
    )


def pictures(count=10):
    rng = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((80, 60), Image.BICUBIC))
        for _ in range(count)
    ]


class FakeDetector:
    """Finds a face whose place follows from the picture; none where the first pixel is dark."""

    def __call__(self, image):
        if image[0, 0, 0] < 100:
            return []
        rng = np.random.default_rng(int(image.sum()) % 1000)
        return [Face(np.concatenate([rng.uniform(15, 45, (478, 2)), np.zeros((478, 1))], 1).astype(np.float32), 0.9)]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "cached_detector", lambda *a, **k: FakeDetector())


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_what_is_stored(tmp_path, fake):
    images = pictures(12)
    make_ffhq(tmp_path, images)
    report = prepare("ffhq", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=48), progress=False, shard_size=5)
    store = CropStore(tmp_path / "crops" / "ffhq")
    expected = [i[0, 0, 0] >= 100 for i in images]
    assert store.found.tolist() == expected and 2 < sum(expected) < 12, "the fixture has both kinds"
    assert (
        report["items"] == len(store) == 12
        and report["faces"] == sum(expected)
        and report["without_face"] == 12 - sum(expected)
        and report["unreadable"] == 0
    )
    assert report["ids_without_face"] == [f"ffhq/{k:05d}" for k in range(12) if not expected[k]]
    assert (
        store.images.shape == (12, 48, 48, 4)
        and store.images.dtype == np.uint8
        and store.points.shape == (12, 478, 2)
        and store.points.dtype == np.float32
    )
    for k, image in enumerate(images):
        if not expected[k]:
            assert store.images[k].max() == 0 and np.isnan(store.points[k]).all() and np.isnan(store.rows["box_cx"][k])
            continue
        points = FakeDetector()(image)[0].points478
        box = store.box(k)
        assert np.abs(from_crop(store.points[k], box) - points[:, :2]).max() < 0.05
        assert np.abs(np.subtract(box.row(), face_box(points, 2.0).row())).max() < 1e-3
        np.testing.assert_array_equal(store.images[k, ..., :3], crop_image(image, face_box(points, 2.0), 48))
        assert set(np.unique(store.images[k, ..., 3])) == {0, 255}
    assert list(store.rows.columns) == list(module.ROWS) and store.cache_scale == 2.0 and store.ids[0] == "ffhq/00000"
    assert (
        (tmp_path / "crops/ffhq/rows.csv")
        .read_text()
        .splitlines()[0]
        .startswith("index,id,split,subject,found,emotion,valence,arousal,box_cx,box_cy,box_side")
    )


def test_labels_and_unknowns(tmp_path, fake):
    from test_readers import make_affectnet, make_celeba

    make_affectnet(tmp_path / "affectnet"), make_celeba(tmp_path / "celeba")
    for name in ("affectnet", "celeba"):
        prepare(name, tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False)
    affectnet, celeba = (CropStore(tmp_path / "crops" / n).rows for n in ("affectnet", "celeba"))
    assert (
        affectnet["emotion"].tolist()[:3] == [0, 1, 2]
        and set(affectnet["valence"]) == {0.25}
        and affectnet["subject"].tolist()[0] == ""
    )
    assert (
        celeba["emotion"].isna().all()
        and celeba["subject"].tolist()[:2] == ["2881", "2880"]
        and celeba["split"].tolist()[-1] == "test"
    )


def test_resumes_and_repeats(tmp_path, fake, monkeypatch):
    """A run that dies after two shards goes on with the third, and the files are those of a run in one go."""
    make_ffhq(tmp_path, pictures(11))
    config = PrepareConfig(cache_size=32)
    prepare("ffhq", tmp_path, tmp_path / "whole", config, progress=False, shard_size=3)
    done = []

    def dies(shard, do=module.do_shard):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.number)
        return do(shard)

    with monkeypatch.context() as patch:
        patch.setattr(module, "do_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare("ffhq", tmp_path, tmp_path / "parts", config, progress=False, shard_size=3)
    with pytest.raises(FileNotFoundError, match="run `fields prepare`"):
        CropStore(tmp_path / "parts" / "ffhq")
    again = []
    monkeypatch.setattr(
        module, "do_shard", lambda shard, do=module.do_shard: (again.append(shard.number), do(shard))[1]
    )
    prepare("ffhq", tmp_path, tmp_path / "parts", config, progress=False, shard_size=3)
    assert done == [0, 1] and again == [2, 3]
    assert content(tmp_path / "whole" / "ffhq") == content(tmp_path / "parts" / "ffhq")
    again.clear()
    prepare("ffhq", tmp_path, tmp_path / "parts", config, progress=False)
    assert again == [], "a finished dataset is left alone"
    Image.fromarray(pictures(1)[0][:, ::-1] // 2).save(tmp_path / "ffhq/images1024x1024/00000/00004.png")
    prepare("ffhq", tmp_path, tmp_path / "parts", config, progress=False)
    assert again, "a changed file is noticed"


def test_unreadable_files_keep_their_row(tmp_path, fake):
    make_ffhq(tmp_path, [i // 2 + 120 for i in pictures(5)])
    path = tmp_path / "ffhq/images1024x1024/00000/00002.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    report = prepare("ffhq", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False)
    rows = CropStore(tmp_path / "crops/ffhq").rows
    assert (
        report["unreadable"] == 1
        and report["faces"] == 4
        and report["without_face"] == 0
        and report["faces"] + report["without_face"] + report["unreadable"] == report["items"]
    )
    assert rows["note"][2].startswith("ffhq/images1024x1024/00000/00002.png is damaged") and rows["found"].tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_videos_are_decoded_once(tmp_path, fake, monkeypatch):
    from test_readers import make_lrw

    make_lrw(tmp_path / "lrw")
    calls = []
    monkeypatch.setattr(
        module,
        "read_frames",
        lambda path, frames, read=module.read_frames: (calls.append(list(frames)), read(path, frames))[1],
    )
    report = prepare("lrw", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False, shard_size=2)
    assert calls == [[0, 1, 2, 3, 4]] * 3 and report["items"] == 15
    assert CropStore(tmp_path / "crops/lrw").ids[6] == "lrw/ABOUT/train/ABOUT_00001/01"


def test_shards_hold_everything():
    rng = np.random.default_rng(0)
    for _ in range(50):
        paths = np.repeat(np.arange(rng.integers(1, 30)), rng.integers(1, 9)).tolist()
        cuts = shards(paths, int(rng.integers(1, 12)))
        assert [k for a, b in cuts for k in range(a, b)] == list(range(len(paths)))
        assert all(paths[a] != paths[a - 1] for a, _ in cuts[1:])


def test_strict_and_problems_in_the_report(tmp_path, fake):
    make_ffhq(tmp_path, pictures(4))
    (tmp_path / "ffhq/images1024x1024/00000/00003.png").write_bytes(b"")
    with pytest.raises(ValueError, match="00003.png: the file is empty"):
        prepare("ffhq", tmp_path, tmp_path / "crops", strict=True, progress=False)
    report = prepare("ffhq", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False)
    assert (
        report["items"] == 3
        and report["faulty"] == 1
        and report["found"] == 4
        and report["problems"] == {"truncated": 1, "count": 1}
    )
    assert report == {**json.loads((tmp_path / "crops/ffhq/report.json").read_text()), "seconds": report["seconds"]}


def test_damaged_store(tmp_path, fake):
    make_ffhq(tmp_path, pictures(4))
    prepare("ffhq", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False)
    np.save(tmp_path / "crops/ffhq/points.npy", np.zeros((3, 478, 2), np.float32))
    with pytest.raises(ValueError, match="different lengths"):
        CropStore(tmp_path / "crops/ffhq")


needs_data = pytest.mark.skipif(not DATA, reason="FIELDS_TEST_DATA is not set")
SCRIPT = """
import sys
from fields.config import PrepareConfig
from fields.data import prepare as module
if __name__ == "__main__":
    module.ALONE = 0
    module.prepare("ffhq", sys.argv[1], sys.argv[2], PrepareConfig(cache_size=64), workers=int(sys.argv[3]), progress=False, shard_size=4)
"""


def photographs(count):
    paths = sorted((Path(DATA) / "photos").glob("*"))
    small = [np.asarray(Image.fromarray(read_image(p)).resize((224, 224), Image.LANCZOS)) for p in paths]
    return [np.roll(small[k % len(small)], k // len(small), axis=1) for k in range(count)]


@needs_data
def test_two_processes_write_what_one_writes(tmp_path):
    """Two processes, one of them killed in between: the same bytes as one process in one go."""
    make_ffhq(tmp_path, photographs(18))
    prepare("ffhq", tmp_path, tmp_path / "one", PrepareConfig(cache_size=64), progress=False, shard_size=4)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), str(tmp_path / "two"), "2"]
    run = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if any((tmp_path / "two/ffhq/unfinished").glob("*.npz")) or run.poll() is not None:
            break
        time.sleep(0.05)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert content(tmp_path / "one/ffhq") == content(tmp_path / "two/ffhq")
    store = CropStore(tmp_path / "two/ffhq")
    assert store.found.all() and open_dataset("ffhq", tmp_path).items[3].id == store.ids[3]


@needs_data
def test_hull_covers_the_face(tmp_path):
    make_ffhq(tmp_path, photographs(6))
    prepare("ffhq", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=96), progress=False)
    store = CropStore(tmp_path / "crops/ffhq")
    inside = ((store.points + 1) * 48).astype(int).clip(0, 95)
    for image, p in zip(store.images, inside):
        assert (image[p[:, 1], p[:, 0], 3] > 0).mean() > 0.97 and 0.12 < (image[..., 3] > 0).mean() < 0.3
    assert isinstance(store.box(0), Box) and abs(np.nanmax(np.abs(store.points)) - 0.5) < 0.1


@pytest.mark.slow
@needs_data
def test_speed(tmp_path):
    """Images a second on all cores, reading, detection and cropping included."""
    images = photographs(600)
    make_ffhq(tmp_path, images)
    workers = len(os.sched_getaffinity(0))
    busy = lambda: sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    start, before = time.perf_counter(), busy()
    report = prepare("ffhq", tmp_path, tmp_path / "crops", workers=workers, progress=False)
    seconds, used = time.perf_counter() - start, busy() - before
    result = {
        "images": len(images),
        "side": 224,
        "cache_size": 160,
        "processes": workers,
        "seconds": round(seconds, 1),
        "images_a_second": round(len(images) / seconds, 1),
        "faces": report["faces"],
        "processor_ms_an_image": round(1e3 * used / len(images), 1),
        "seconds_for_8000": round(8000 * seconds / len(images), 1),
        "with": "read 224 px png, MediaPipe 0.10.21, crop 160 px, start of the processes included",
    }
    (ROOT / "evidence" / "prepare_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    assert report["faces"] >= 0.99 * len(images) and result["seconds_for_8000"] < 600


def test_on_a_dask_cluster(tmp_path, fake):
    """The executor of a Dask client serves as the pool."""
    distributed = pytest.importorskip("distributed")
    make_ffhq(tmp_path, pictures(9))
    config = PrepareConfig(cache_size=16)
    prepare("ffhq", tmp_path, tmp_path / "here", config, progress=False, shard_size=2)
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        prepare("ffhq", tmp_path, tmp_path / "there", config, progress=False, shard_size=2, pool=client.get_executor())
    assert content(tmp_path / "here/ffhq") == content(tmp_path / "there/ffhq")


def test_summary(tmp_path, fake):
    from fields.data.prepare import summary
    from test_readers import make_affectnet

    make_affectnet(tmp_path / "affectnet")
    (tmp_path / "affectnet/train_set/images/1.jpg").write_bytes(b"")
    text = summary(prepare("affectnet", tmp_path, tmp_path / "crops", PrepareConfig(cache_size=16), progress=False))
    assert (
        "11 items of 13 found: 7 train (of 8 expected), 4 val (of 4 expected)" in text
        and "dropped by rule: 1 contempt" in text
    )
    assert "2 problems, 1 samples lost: 1 truncated, 1 count" in text and "images/1.jpg: the file is empty" in text


def test_workers_end_with_a_killed_parent(tmp_path):
    """SIGKILL leaves the parent no time to end its workers, so they end by themselves."""
    import ast

    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom fields.data.prepare import worker_pool\nif __name__ == '__main__':\n    pool = worker_pool(2)\n"
        "    [f.result() for f in [pool.submit(abs, -1) for _ in range(4)]]\n    print(list(pool._processes), flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    workers = ast.literal_eval(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    ends = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < ends:
        time.sleep(0.2)
    assert workers and not any(map(alive, workers))
