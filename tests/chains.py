"""How the chain tests start chains and read what they wrote."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINI = [
    f"--set={s}"
    for s in (
        "world.image_size=112",
        "world.bp4d_subjects=6",
        "world.affectnet_train=70",
        "world.affectnet_heldout=10",
        "world.celeba_identities=4",
        "world.ffhq_images=8",
        "world.lrw_clips=2",
        "world.lrw_frames=4",
        "world.mead_clips=2",
        "world.mead_frames=4",
        "world.identity_identities=10",
        "world.identity_images=1",
        "standins.correspondence_images=30",
        "pretrain.steps=4",
        "pretrain.validate_every=2",
        "train.steps=2",
        "train.teaser_steps=2",
        "train.methods=F1,F4",
        "evaluation.probe_epochs=3",
        "evaluation.bootstrap=50",
        "evaluation.figure_points=60",
    )
]


def chain(run, *arguments, **environment):
    command = [
        sys.executable,
        "-c",
        "from fields.cli import main; main()",
        "chain",
        "--run",
        str(run),
        "--profile",
        "smoke",
        *arguments,
    ]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **threads, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=1500)
    return process.returncode, out, err


def metrics(run):
    return {p.name: p.read_bytes() for p in sorted((run / "metrics").glob("*.json"))}


def one_sentence(err):
    lines = [l for l in err.strip().splitlines() if l.startswith("fields: ")]
    return len(lines) == 1 and "Traceback" not in err
