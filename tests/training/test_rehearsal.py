"""The paper's experiment, rehearsed on tiny copies of its datasets in their official layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rehearsal import make_rehearsal

from fields.scans.labels import ExpressionLabels

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("FIELDS_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="needs a FLAME-format head: set FIELDS_TEST_DATA")

SHORT = (
    "allow_standins=fan,points203,templates,emotion_features,teaser",
    "network.size=small",
    "network.image_size=64",
    "prepare.cache_size=92",
    "scans.max_points=400",
    "scans.max_steps=5",
    "scans.subject_frames=2",
    "standins.trunk_steps=1",
    "standins.emotion_steps=1",
    "standins.correspondence_images=12",
    "pretrain.steps=1",
    "pretrain.batch=4",
    "pretrain.validate_every=1",
    "train.steps=1",
    "train.teaser_steps=1",
    "train.batch=4",
    "train.precision=32",
    "train.methods=F4",
)
LONG = (
    "allow_standins=fan,points203,templates,emotion_features",
    "scans.max_points=800",
    "scans.max_steps=6",
    "standins.emotion_steps=2",
    "standins.correspondence_images=40",
    "pretrain.steps=2",
    "pretrain.batch=4",
    "pretrain.validate_every=2",
    "train.steps=2",
    "train.teaser_steps=2",
    "train.batch=4",
    "train.precision=32",
    "evaluation.probe_width=64",
    "evaluation.probe_epochs=3",
    "evaluation.bootstrap=50",
    "evaluation.figure_points=60",
)


def fields(*arguments, code=0):
    command = [sys.executable, "-c", "from fields.cli import main; main()", *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def sets(settings):
    return [f"--set={s}" for s in settings]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """What a laboratory has: six datasets, a head with its official side files, weights."""
    return make_rehearsal(tmp_path_factory.mktemp("laboratory"), DATA)


@pytest.fixture(scope="module")
def short_run(laboratory, tmp_path_factory):
    """From the readers to one step of F4: about four minutes of one core, so what looks at it is slow."""
    run = tmp_path_factory.mktemp("rehearsal") / "run"
    fields("chain", "--profile", "paper", "--run", run, "--to", "train_F4", *sets([*laboratory, *SHORT]))
    return run


@pytest.mark.slow
def test_from_the_readers_to_a_step_of_f4(short_run):
    summary = json.loads((short_run / "checkpoints/F4/summary.json").read_text())
    assert summary["steps"] == 1 and "VGG16" in " ".join(summary["notes"])


@pytest.mark.slow
def test_labels_survive_the_official_side_files(short_run):
    """Fault 1: no file that FLAME, SMIRK, TEASER or MICA distribute holds the 83 landmarks; scans count from 1."""
    labels = ExpressionLabels.load(short_run / "scans/labels.npz")
    reasons = [str(r) for r in labels.rejected if str(r)]
    assert len(labels) == 18 and len(reasons) == 1 and reasons[0].startswith("no scan"), reasons
    assert np.median(labels.residual[labels.accepted]) < 1e-3


@pytest.mark.slow
def test_crops_are_compressed_shards(short_run):
    """Fault 15: every dataset's crops are tar files of JPEG pictures with an index."""
    from fields.data.prepare import CropStore

    for name in ("lrw", "celeba", "ffhq", "mead", "affectnet", "bp4d"):
        store = CropStore(short_run / "crops" / name)
        assert sorted(store.path.glob("shards/*.tar")) and not (store.path / "images.npy").exists(), name
        assert store.found.any() and store.images[np.flatnonzero(store.found)].any(axis=(1, 2, 3)).all()


@pytest.mark.slow
def test_the_first_second_says_what_is_missing(laboratory, tmp_path):
    """Fault 13: without MICA and AffectNet nothing starts, and one table says so."""
    (tmp_path / "weights").mkdir()
    changed = [s for s in laboratory if not s.startswith("assets")] + [f"assets={tmp_path / 'weights'}"]
    said = fields("chain", "--profile", "paper", "--run", tmp_path / "run", *sets(changed), code=1)
    assert "nothing was started" in said and "mica" in said and "vgg16" in said and "Traceback" not in said
    assert not (tmp_path / "run/steps").exists()
    told = fields("doctor", "--profile", "paper", *sets([*laboratory, "allow_standins=fan,points203"]), code=1)
    assert "+ bp4d" in told and "~ fan" in told and "- templates" in told and "+ mica" in told


@pytest.mark.slow
def test_two_processes_are_recorded_and_reused(short_run, laboratory):
    """Fault 3: the chain starts two processes, records the step, and the next chain keeps the result."""
    settings = sets([*laboratory, *SHORT, "devices=2", "train.steps=2"])
    chain = ("chain", "--profile", "paper", "--run", short_run, "--to", "train_F4", "--force", *settings)
    fields(*chain)
    record = json.loads((short_run / "steps/train_F4.json").read_text())
    assert "checkpoints/F4/model.safetensors" in record["outputs"]
    assert "nothing to do" in fields(*chain)


@pytest.mark.slow
def test_the_whole_experiment(laboratory, tmp_path):
    """All rows of the paper profile at 224 px with the paper's networks, from the readers to the report."""
    run = tmp_path / "run"
    fields("chain", "--profile", "paper", "--run", run, *sets([*laboratory, *LONG]))
    assert (run / "report.html").is_file()
    for method in ("F0", "F1", "F2", "F3", "F4", "SMIRK", "TEASER", "EMOCA", "lambda0.5", "lambda1", "lambda10"):
        assert (run / "checkpoints" / method / "model.safetensors").is_file(), method
