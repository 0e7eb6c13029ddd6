"""Faults that an audit of the paper's path found, each as a test that failed before its mend."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


# 9: a difference over few seeds was called resolved with the quantile of many.


def seeds_with_spread(*means, half=0.001):
    return [
        {
            "values": {"emotion/F4/accuracy": mean},
            "differences": {
                "emotion/F4-F1/accuracy": dict(mean=mean, ci_low=mean - half, ci_high=mean + half, resolved=True)
            },
        }
        for mean in means
    ]


def test_9_three_seeds_are_three():
    from fields.evaluation.seeds import merge_seeds

    # mean .05, spread .03: 1.96 * .03 / sqrt(3) is .034, Student's t with two degrees of freedom makes it .075
    merged = merge_seeds(seeds_with_spread(0.02, 0.05, 0.08))["differences"]["emotion/F4-F1/accuracy"]
    assert not merged["resolved"]
    assert merged["ci_high"] - merged["mean"] == pytest.approx(4.3027 * 0.03 / np.sqrt(3), abs=1e-4)
    # thirty seeds of the same spread resolve it
    many = merge_seeds(seeds_with_spread(*np.tile([0.02, 0.05, 0.08], 10)))["differences"]["emotion/F4-F1/accuracy"]
    assert many["resolved"]


def test_9_the_study_file_is_what_its_seeds_say(tmp_path):
    from fields.evaluation.seeds import merge_files

    files = sorted((ROOT / "evidence").glob("study_seed*.json"))
    merge_files(files, tmp_path)
    kept = json.loads((ROOT / "evidence" / "study.json").read_text())
    fresh = json.loads((tmp_path / "study.json").read_text())
    assert {k: kept[k] for k in fresh} == fresh


# 11: whole sets of pictures and faces were held at once.


def test_11_pictures_are_let_go_while_points_are_read():
    """At most two batches of pictures are alive, however large the set."""
    import gc
    import weakref
    from types import SimpleNamespace

    import torch

    from fields.evaluation.landmarks import detected_points

    alive, most = [], []

    class Data:
        def evaluation(self, dataset, split, batch):
            for k in range(12):
                batch = SimpleNamespace(
                    ids=[f"{k}/{i}" for i in range(4)],
                    image=torch.zeros(4, 3, 8, 8),
                    mediapipe=torch.full((8, 105, 2), float(k))[:4],  # a view, as of a larger table
                )
                alive.append(weakref.ref(batch.image))
                gc.collect()
                most.append(sum(r() is not None for r in alive))
                yield batch

    ids, points = detected_points(Data(), "affectnet_val")
    assert len(ids) == 48 and points.shape == (48, 105, 2) and points[-1, 0, 0] == 11
    assert max(most) <= 2


def test_11_faces_are_posed_in_blocks(monkeypatch):
    """No call poses more than a block of frames."""
    from fields.evaluation import geometry, landmarks
    from fields.head.flame import Head
    from fields.types import HeadParams

    head, seen = Head.load("open"), []

    class Watched:
        def __init__(self, head):
            self.head = head

        def __call__(self, params):
            seen.append(len(params))
            return self.head(params)

        def __getattr__(self, name):
            return getattr(self.head, name)

    params = HeadParams.neutral(5)
    geometry.face_errors(Watched(head), params, params, block=2)
    points = landmarks.projected(head, params)
    landmarks.set_errors(Watched(head), params, points, block=2)
    assert len(seen) > 9 and max(seen) == 2


# 12: the probe ignored the run's device, and scans were measured in one process.


def test_12_the_probe_runs_where_the_run_does(monkeypatch):
    from fake_run import smoke_config

    import torch

    from fields.evaluation import emotion
    from fields.types import HeadParams, Prediction

    class Seen(Exception):
        pass

    def watched(x, *arguments):
        raise Seen(str(x.device))

    monkeypatch.setattr(emotion, "probe", watched)
    ids = [str(k) for k in range(70)]
    labels = emotion.Labels(ids, np.arange(70) % 7, np.zeros(70), np.zeros(70))
    said = {"F0": Prediction(HeadParams.neutral(70), ids, "", "F0")}
    with pytest.raises(Seen, match="meta"):
        emotion.run_protocol(said, labels, smoke_config().evaluation, device=torch.device("meta"))


def test_12_workers_do_not_change_the_distances(tmp_path, monkeypatch):
    """Scan-to-mesh distances over two processes are those of one, and both processes measure."""
    from fake_run import fake_run

    from fields.comparison import read_predictions, select
    from fields.evaluation import surfaces
    from fields.evaluation.parameters import read_fits
    from fields.scans import workers

    run, head = fake_run(tmp_path / "run", heldout=3, train=70, frames=3, methods=("F1",))
    fits, _ = read_fits(run, head)
    found = read_predictions(run, ["F1"], "bp4d_test", head)
    ids = [i for i in fits.ids if i in set(found["F1"].ids)]
    here, params = fits.take(ids), {"F1": select(found["F1"], ids).params}
    monkeypatch.setattr(workers, "ALONE", 0.0)  # begin the helper at once
    one = surfaces.measure_scans(run, head, here, params, 1)
    two = surfaces.measure_scans(run, head, here, params, 2)
    assert len(one) == len(ids) == 18 and one == two


# 17: the shape error had no switch, and two figures said FAN whatever was used.


def test_17_shape_error_over_all_components():
    from fields.evaluation.parameters import counted_components
    from fields.head.flame import Head

    head = Head.load("open")
    assert counted_components(head, "all").sum() == 300 > counted_components(head, "real").sum()
    with pytest.raises(ValueError, match="shape_components"):
        counted_components(head, "none")


def test_17_figures_name_what_was_used():
    from fields.evaluation.diagrams import Pieces, figure8, figure9

    for draw in (figure8, figure9):
        words = " ".join(t.get_text() for t in draw(Pieces()).axes[0].texts)
        assert "FAN" not in words and "MICA" not in words and "17 contour points" in words
        named = Pieces(contour="FAN contour", identity="identity network (MICA)")
        assert "FAN" in " ".join(t.get_text() for t in draw(named).axes[0].texts)
