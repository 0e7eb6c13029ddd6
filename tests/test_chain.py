"""The smoke chain, end to end: it runs, resumes, reuses, and says in one sentence what is wrong."""
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

ROOT = Path(__file__).parents[1]
MINI = [f"--set={s}" for s in (
    "world.image_size=112", "world.bp4d_subjects=6", "world.affectnet_train=70", "world.affectnet_heldout=10", "world.celeba_identities=4",
    "world.ffhq_images=8", "world.lrw_clips=2", "world.lrw_frames=4", "world.mead_clips=2", "world.mead_frames=4", "world.identity_identities=10",
    "world.identity_images=1", "standins.correspondence_images=30", "pretrain.steps=4", "pretrain.validate_every=2", "train.steps=2", "train.teaser_steps=2",
    "train.methods=F1,F4", "evaluation.probe_epochs=3", "evaluation.bootstrap=50", "evaluation.figure_points=60")]


def chain(run, *arguments, **environment):
    command = [sys.executable, "-c", "from fields.cli import main; main()", "chain", "--run", str(run), "--profile", "smoke", *arguments]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **threads, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    out, err = process.communicate(timeout=1500)
    return process.returncode, out, err


def metrics(run):
    return {p.name: p.read_bytes() for p in sorted((run / "metrics").glob("*.json"))}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run; its training steps could not open the truth."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    started = time.monotonic()
    for arguments, environment in ((["--to", "world"], {}), (["--to", "train_F4"], {"PYTHONPATH": str(ROOT / "tests" / "forbid")}), ([], {})):
        code, out, err = finish(chain(run, *arguments, **environment))
        assert code == 0, err[-2000:]
    print(f"smoke chain: {time.monotonic() - started:.0f} s")
    return run


def test_the_chain_ends_with_a_report(smoke):
    report = (smoke / "report.html").read_text(encoding="utf-8")
    assert "demo world" in report.lower() and "never results of the paper" in report and len(report) > 50_000
    assert not [w for w in ('src="http', 'href="http://cdn', "<script src") if w in report], "the report must open offline"
    assert {p.stem for p in (smoke / "notebooks").glob("*.ipynb")} >= {"world", "fit_scans", "pretrain", "train_F1", "train_F4", "emotion", "report"}
    assert {"emotion.json", "parameters.json", "geometry.json", "landmarks.json", "ablation.json"} <= set(metrics(smoke))


def test_metrics_hold_no_time_host_or_path(smoke):
    for name, data in metrics(smoke).items():
        text = data.decode()
        assert str(smoke) not in text and "seconds" not in text and os.uname().nodename not in text, name
        json.loads(text)


def test_the_photograph_is_reconstructed(smoke):
    made = {p.name for p in (smoke / "photograph").iterdir()}
    assert {"astronaut.npz", "astronaut.obj", "astronaut.glb", "astronaut.png", "predictions.csv"} <= made


def test_controls_on_held_out_images(smoke):
    """The oracle is at or above every method within the paired interval; constant and shuffled labels are at chance."""
    held = json.loads(metrics(smoke)["emotion.json"])["protocols"]["heldout"]
    oracle = held["methods"]["oracle"]["accuracy"]
    for method, record in held["methods"].items():
        assert oracle["ci_high"] >= record["accuracy"]["ci_low"], method
    for control in ("constant", "shuffled"):
        assert abs(held["controls"][control]["accuracy"]["mean"] - held["chance"]["accuracy"]) <= 2 * held["chance"]["accuracy_band"], control
    assert abs(held["controls"]["constant"]["V-CCC"]["mean"]) <= held["chance"]["ccc_band"]


def test_a_finished_run_does_nothing(smoke):
    code, out, err = finish(chain(smoke))
    assert code == 0 and "nothing to do" in out


def test_a_changed_parameter_runs_what_depends_on_it(smoke, tmp_path):
    from fields.config import load_profile
    from fields.stage import RunDir, plan

    run = RunDir(smoke)
    same, other = load_profile("smoke"), load_profile("smoke", ["evaluation.bootstrap=77"])
    pipeline = ROOT / "nbs" / "pipeline"
    reused = [s.name for s in plan(other) if run.finished(s, run.key(s, other, pipeline / f"{s.notebook}.ipynb"))]
    assert all(run.finished(s, run.key(s, same, pipeline / f"{s.notebook}.ipynb")) for s in plan(same))
    assert "train_F4" in reused and "predict" in reused and "emotion" not in reused


def test_plain_papermill_runs_one_notebook(smoke, tmp_path):
    command = [sys.executable, "-m", "papermill", "nbs/pipeline/11_tables.ipynb", str(tmp_path / "out.ipynb"), "-p", "run", str(smoke), "-p", "profile", "smoke", "-k", "python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def one_sentence(err):
    lines = [l for l in err.strip().splitlines() if l.startswith("fields: ")]
    return len(lines) == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments, said", [
    (["--set", "train.stepz=4"], "unknown key"), (["--set", "train.steps=x"], "is not a int"), (["--to", "bake"], "unknown step"),
    (["--from", "emotion", *MINI], "which is not done"),
], ids=["key", "type", "step", "missing input"])
def test_mistakes_are_one_sentence(tmp_path, arguments, said):
    code, out, err = finish(chain(tmp_path / "run", *arguments))
    assert code == 1 and said in err and one_sentence(err), err


def test_a_failing_cell_is_named(smoke, tmp_path):
    """A step whose input was damaged names its notebook and cell, and is not counted as done."""
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    (run / "metrics" / "emotion.json").write_text("{ half")
    code, out, err = finish(chain(run, "--from", "tables", "--to", "tables"))
    assert code == 1 and "11_tables.ipynb, cell" in err and one_sentence(err), err
    assert not (run / "steps" / "tables.json").exists()


@pytest.mark.slow
def test_a_killed_chain_ends_with_the_same_metrics(tmp_path):
    """Three kills of a miniature chain, against one that was never killed."""
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    started = time.monotonic()
    code, out, err = finish(chain(whole, *MINI))
    assert code == 0, err[-2000:]
    seconds = time.monotonic() - started
    for k in range(3):
        process = chain(killed, *MINI)
        try:
            process.wait(timeout=seconds * draw.uniform(.15, .4))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, out, err = finish(chain(killed, *MINI))
    assert code == 0, err[-2000:]
    assert metrics(killed) == metrics(whole)


def test_two_chains_in_one_folder(tmp_path):
    from fields.chain import ChainError, lock, run_chain

    with lock(tmp_path), pytest.raises(ChainError, match="another chain"):
        run_chain(tmp_path, "smoke", quiet=True)
