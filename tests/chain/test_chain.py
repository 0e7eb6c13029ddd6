"""The smoke chain, end to end: it runs, resumes, reuses, and says in one sentence what is wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from chains import MINI, ROOT, chain, finish, metrics, one_sentence

from fields.chain import execute


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run; its training steps could not open the truth."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    started = time.monotonic()
    for arguments, environment in (
        (["--to", "world"], {}),
        (["--to", "train_F4"], {"PYTHONPATH": str(ROOT / "tests" / "forbid")}),
        ([], {}),
    ):
        code, out, err = finish(chain(run, *arguments, **environment))
        assert code == 0, err[-2000:]
    print(f"smoke chain: {time.monotonic() - started:.0f} s")
    return run


def test_the_chain_ends_with_a_report(smoke):
    report = (smoke / "report.html").read_text(encoding="utf-8")
    assert "demo world" in report.lower() and "never results of the paper" in report and len(report) > 50_000
    assert not [w for w in ('src="http', 'href="http://cdn', "<script src") if w in report], (
        "the report must open offline"
    )
    assert {p.stem for p in (smoke / "notebooks").glob("*.ipynb")} >= {
        "world",
        "fit_scans",
        "pretrain",
        "train_F1",
        "train_F4",
        "emotion",
        "report",
    }
    assert {"emotion.json", "parameters.json", "geometry.json", "landmarks.json", "ablation.json"} <= set(
        metrics(smoke)
    )


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
        assert (
            abs(held["controls"][control]["accuracy"]["mean"] - held["chance"]["accuracy"])
            <= 2 * held["chance"]["accuracy_band"]
        ), control
    assert abs(held["controls"]["constant"]["V-CCC"]["mean"]) <= held["chance"]["ccc_band"]


def test_a_finished_run_does_nothing(smoke):
    code, out, err = finish(chain(smoke))
    assert code == 0 and "nothing to do" in out


def test_a_changed_parameter_runs_what_depends_on_it(smoke, tmp_path):
    from fields.config import load_profile
    from fields.plan import plan
    from fields.stage import RunDir

    run = RunDir(smoke)
    same, other = load_profile("smoke"), load_profile("smoke", ["evaluation.bootstrap=77"])
    pipeline = ROOT / "nbs" / "pipeline"
    reused = [s.name for s in plan(other) if run.finished(s, run.key(s, other, pipeline / f"{s.notebook}.ipynb"))]
    assert all(run.finished(s, run.key(s, same, pipeline / f"{s.notebook}.ipynb")) for s in plan(same))
    assert "train_F4" in reused and "predict" in reused and "emotion" not in reused


def test_plain_papermill_runs_one_notebook(smoke, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "nbs/pipeline/11_tables.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "run",
        str(smoke),
        "-p",
        "profile",
        "smoke",
        "-k",
        "python3",
    ]
    for _ in range(3):  # papermill alone uses ports, which a kernel started at the same moment may take
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if "Address already in use" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-1500:]


def test_kernels_of_the_chain_take_no_ports(tmp_path):
    """Two kernels that start together must not race for a port: each has a folder of its own, gone afterwards."""
    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("from ipykernel.connect import get_connection_info\nprint(get_connection_info())")
        ]
    )
    book.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(book, tmp_path / "a.ipynb")
    execute(tmp_path / "a.ipynb", tmp_path / "out.ipynb", {})
    told = json.loads(nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text)
    assert told["transport"] == "ipc" and not Path(told["ip"]).parent.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "train.stepz=4"], "unknown key"),
        (["--set", "train.steps=x"], "is not a int"),
        (["--to", "bake"], "unknown step"),
        (["--from", "emotion", *MINI], "which is not done"),
    ],
    ids=["key", "type", "step", "missing input"],
)
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


def test_two_chains_in_one_folder(tmp_path):
    from fields.chain import ChainError, lock, run_chain

    with lock(tmp_path), pytest.raises(ChainError, match="another chain"):
        run_chain(tmp_path, "smoke", quiet=True)


def _threads_of(number):
    import cv2
    import torch

    time.sleep(0.05)
    return number, os.getpid(), torch.get_num_threads(), cv2.getNumThreads()


def test_work_is_shared_by_processes_of_one_thread():
    """Every job is done once, by this process and a helper; the helper has one thread, this one gets its threads back."""
    import cv2
    import torch
    from fields.workers import one_thread, work_together

    threads, before = (
        lambda: (torch.get_num_threads(), cv2.getNumThreads()),
        (torch.get_num_threads(), cv2.getNumThreads()),
    )
    torch.set_num_threads(2), cv2.setNumThreads(2)
    with one_thread("cv2", "torch"):
        done = list(work_together(_threads_of, list(range(200)), 2, "cv2", "torch"))
    assert sorted(d[0] for d in done) == list(range(200))
    assert len({d[1] for d in done}) == 2 and os.getpid() in {d[1] for d in done}
    assert {d[2:] for d in done} == {(1, 1)} and threads() == (2, 2)
    torch.set_num_threads(before[0]), cv2.setNumThreads(before[1])
