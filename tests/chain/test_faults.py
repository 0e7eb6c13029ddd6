"""Twenty kills of the smoke chain, of a training, of scan fitting and of a folder of photographs; a full disk and one that cannot be written to (the long proofs)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chains import ROOT, chain, finish, metrics, one_sentence

KILLS = 20
TRAIN = """
import sys
from fake_data import fake_sources, prepared, small_config
from fields.head.flame import Head
from fields.training.methods import run_method
head = Head.load('open')
run_method(sys.argv[1], 'F4', small_config(**{'train.steps': 60, 'train.checkpoint_every': 5}), head, fake_sources(head))
"""
FIT = """
import sys
from pathlib import Path
from test_scans import SETTINGS, world
from fields.head.flame import Head
from fields.scans.labels import fit_dataset
from fields.scans.surface import head_model
small = head_model(Head.load('open'), 60, 24)
items, _ = world(small, Path(sys.argv[1]), subjects=('F001', 'F002', 'M001'), frames=6)
fit_dataset(items, small, SETTINGS, Path(sys.argv[2]), workers=2)
"""


def script(text, *arguments):
    "Start a script of this file in a process group of its own."
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def whole_run(process):
    "Wait for a run without a fault; returns its seconds."
    begin = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - begin


def kill_often(start, low, high, target, check=lambda: None):
    """Start, SIGKILL the whole group after a random time and look at what is left, until KILLS died at work, that is, after they had written
    something; one that ends first begins anew. Returns the number of starts."""
    moments, died, starts = random.Random(0), 0, 0
    while died < KILLS:
        begin, process, starts = time.time(), start(), starts + 1
        try:
            process.wait(moments.uniform(low, high))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        died += process.returncode == -signal.SIGKILL and any(p.stat().st_mtime >= begin for p in target.rglob("*"))
        assert process.returncode in (0, -signal.SIGKILL) and starts < 10 * KILLS
        check()
        if process.returncode == 0:
            shutil.rmtree(target)
    return starts


def keep(**found):
    "Add to evidence/faults.json."
    path = ROOT / "evidence" / "faults.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(dict(sorted((old | found).items())), indent=1) + "\n")


@pytest.mark.slow
def test_a_chain_survives_twenty_kills(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out, err = finish(chain(whole))
    assert code == 0, err[-2000:]
    starts = kill_often(lambda: chain(killed), 10, 40, killed)
    code, out, err = finish(chain(killed))
    assert code == 0, err[-2000:]
    keep(smoke_chain={"kills_at_work": KILLS, "starts": starts, "metrics_identical": metrics(killed) == metrics(whole)})
    assert metrics(killed) == metrics(whole)


@pytest.mark.slow
def test_a_training_survives_twenty_kills(tmp_path):
    from fake_data import fake_sources, prepared
    from fields.head.flame import Head
    from fields.models.fields import read_tensors

    head = Head.load("open")
    for name in ("whole", "killed"):
        prepared(tmp_path / name, head, fake_sources(head))
    assert script(TRAIN, tmp_path / "whole").wait() == 0
    folder = tmp_path / "killed" / "checkpoints"
    starts = kill_often(lambda: script(TRAIN, tmp_path / "killed"), 6, 14, folder / "F4")
    assert script(TRAIN, tmp_path / "killed").wait() == 0
    files = [tmp_path / n / "checkpoints" / "F4" for n in ("whole", "killed")]
    a, b = (read_tensors(f / "model.safetensors")[0] for f in files)
    same = (
        set(a) == set(b)
        and all((a[k] == b[k]).all() for k in a)
        and len({(f / "log.csv").read_bytes() for f in files}) == 1
    )
    keep(training={"kills_at_work": KILLS, "starts": starts, "weights_and_log_identical": bool(same)})
    assert same


@pytest.mark.slow
def test_scan_fitting_survives_twenty_kills(tmp_path):
    content = lambda f: {p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*.npz"))}
    seconds = [whole_run(script(FIT, tmp_path / "data", tmp_path / name)) for name in ("cold", "whole")][1]
    whole = content(tmp_path / "whole")

    def no_half_file():
        for name, found in content(tmp_path / "killed").items():
            assert whole.get(name, found) == found, f"{name} is half a file"

    starts = kill_often(
        lambda: script(FIT, tmp_path / "data", tmp_path / "killed"),
        0.4 * seconds,
        seconds,
        tmp_path / "killed",
        no_half_file,
    )
    assert script(FIT, tmp_path / "data", tmp_path / "killed").wait() == 0
    keep(
        scan_fitting={
            "kills_at_work": KILLS,
            "starts": starts,
            "files": len(whole),
            "identical": content(tmp_path / "killed") == whole,
        }
    )
    assert content(tmp_path / "killed") == whole


@pytest.mark.slow
def test_a_folder_of_photographs_survives_twenty_kills(tmp_path):
    import numpy as np
    import skimage.data
    from PIL import Image

    for k in range(100):
        Image.fromarray(np.roll(skimage.data.astronaut()[:300, 60:400], 3 * (k % 12), 1)).save(
            tmp_path / f"{k:02d}.png"
        )
    line = [
        sys.executable,
        "-c",
        "from fields.cli import main; main()",
        "reconstruct",
        str(tmp_path),
        "--no-panel",
        "--out",
    ]
    start = lambda out: subprocess.Popen(
        [*line, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    content = lambda folder: {p.name: p.read_bytes() for p in folder.glob("*") if p.suffix in (".obj", ".glb", ".csv")}
    seconds = [whole_run(start(tmp_path / name)) for name in ("cold", "whole")][1]
    whole, killed = content(tmp_path / "whole"), tmp_path / "killed"

    def no_half_file():
        for name, found in content(killed).items():
            assert name not in whole or name.endswith(".csv") or found == whole[name], f"{name} is half a file"

    starts = kill_often(lambda: start(killed), 0.4 * seconds, seconds, killed, no_half_file)
    assert start(killed).wait() == 0
    keep(folder={"kills_at_work": KILLS, "starts": starts, "files": len(whole), "identical": content(killed) == whole})
    assert content(killed) == whole


@pytest.mark.slow
@pytest.mark.parametrize("options, words", [("size=1m", "No space left"), ("ro", "Read-only")])
def test_a_disk_that_takes_nothing_is_one_sentence(tmp_path, options, words):
    "A full disk and a read-only one: one sentence for a folder of photographs, and nothing that looks whole."
    import skimage.data
    from PIL import Image

    disk = tmp_path / "disk"
    disk.mkdir()
    for k in range(12):
        Image.fromarray(skimage.data.astronaut()[:300, 60:400]).save(tmp_path / f"{k}.png")
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("a disk can be mounted by root only")
    try:
        started = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from fields.cli import main; main()",
                "reconstruct",
                str(tmp_path),
                "--no-panel",
                "--out",
                str(disk / "out"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode not in (0, -9) and time.monotonic() - started < 300
        assert one_sentence(done.stderr) or done.stderr.count("\n") <= 14, done.stderr
        assert "Traceback" not in done.stderr and words in done.stderr + done.stdout, done.stderr
        assert not list(Path(disk).rglob("*.part"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
