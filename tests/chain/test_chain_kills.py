"""A miniature chain that is killed, or runs out of disk, ends with the same files as one that was not."""

import os
import random
import signal
import subprocess
import time

import pytest
from chains import MINI, chain, finish, metrics, one_sentence


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A chain that was never stopped, and how long it took."""
    run, started = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    code, out, err = finish(chain(run, *MINI))
    assert code == 0, err[-2000:]
    return run, time.monotonic() - started


def test_a_killed_chain_ends_with_the_same_metrics(whole, tmp_path):
    """Three kills, each somewhere in what was left."""
    (run, seconds), killed, draw = whole, tmp_path / "killed", random.Random(0)
    for k in range(3):
        process = chain(killed, *MINI)
        try:
            process.wait(timeout=seconds * draw.uniform(0.15, 0.4))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, out, err = finish(chain(killed, *MINI))
    assert code == 0, err[-2000:]
    assert metrics(killed) == metrics(run)


def test_a_full_disk_is_one_sentence(whole, tmp_path):
    """A disk of 4 MB is full before the world is written; nothing counts as done."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("a small disk can be mounted by root only")
    try:
        code, out, err = finish(chain(disk / "run", *MINI, "--to", "world"))
        assert code == 1 and one_sentence(err) and "No space left" in err, err
        assert not (disk / "run" / "steps" / "world.json").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
