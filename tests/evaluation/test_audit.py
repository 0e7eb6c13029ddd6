"""The audit of the paper's path: each of its faults as a case that failed before it was mended."""

import ast
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fields.config import load_profile, to_dict
from fields.data.readers import open_dataset
from fields.files import write_json
from fields.plan import code_hash, method_step, plan, settings_of
from fields.stage import RunDir, claim

ROOT = Path(__file__).parents[2]

# fault -> the tests that fail without its mend
AUDIT = {
    1: [
        "test_audit.py::test_01_a_head_without_the_scans_landmarks_is_one_error",
        "test_audit.py::test_01_no_accepted_fit_is_an_error",
        "test_audit.py::test_01_expression_loss_without_labels_is_refused",
        "test_rehearsal.py::test_labels_survive_the_official_side_files",
    ],
    2: [
        "test_audit.py::test_02_one_rule_finds_head_side_files_and_data",
        "test_audit.py::test_02_a_head_is_found_by_name_and_from_any_folder",
    ],
    3: ["test_rehearsal.py::test_two_processes_are_recorded_and_reused"],
    4: ["test_rows.py::test_shape_is_the_base_models_to_the_bit", "test_rows.py::test_first_step_totals"],
    5: [],
    6: [
        "test_audit.py::test_06_the_paper_profile_trains_every_row",
        "test_rehearsal.py::test_the_whole_experiment",
    ],
    7: [
        "test_audit.py::test_07_a_row_depends_on_no_other_row",
        "test_audit.py::test_07_plots_and_comments_are_in_no_training_key",
    ],
    8: ["test_rows.py::test_batchnorm_is_synchronised_where_there_are_several_processes"],
    9: [
        "test_audit.py::test_9_three_seeds_are_three",
        "test_audit.py::test_9_the_study_file_is_what_its_seeds_say",
    ],
    10: ["test_audit.py::test_10_counting_crops_holds_one_at_a_time"],
    11: [],
    12: [],
    13: ["test_rehearsal.py::test_the_first_second_says_what_is_missing"],
    14: ["test_audit.py::test_14_sequence_landmarks_go_by_frame_number"],
    15: [
        "test_audit.py::test_15_packed_crops_are_what_was_written",
        "test_rehearsal.py::test_crops_are_compressed_shards",
    ],
    16: ["test_rows.py::test_the_initialisations_length_is_teasers"],
    17: ["test_rows.py::test_all_processes_take_the_first_ones_precision"],
    18: [
        "test_rows.py::test_what_a_row_does_not_list_is_never_drawn",
        "test_rows.py::test_weights_of_flames_mesh",
        "test_rows.py::test_pasted_colors_are_not_clamped",
    ],
    19: ["test_rows.py::test_lids_travel_from_the_row_to_checkpoint_and_prediction"],
    20: ["test_rows.py::test_first_step_totals"],
    21: ["test_rows.py::test_a_panel_gives_smirks_synthesizer_pixels_of_the_face"],
    22: ["test_rows.py::test_famos_draws_a_folder_first"],
    23: ["test_rows.py::test_only_the_cycle_step_is_clipped"],
    24: ["test_rows.py::test_first_step_totals", "test_rows.py::test_teasers_cycle_reads_the_deepest_token"],
    25: [],
}


def test_every_named_test_exists():
    """The list cannot name a test that is not there."""
    assert sorted(AUDIT) == list(range(1, 26))
    for name in [n for names in AUDIT.values() for n in names]:
        file, test = name.split("::")
        tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


# 1: labels do not vanish


def _scan(which, rejected=""):
    from fields.scans.labels import CroppedScan

    return CroppedScan(np.zeros((10, 3), np.float32), np.zeros((83, 3)), which, 100, rejected)


def test_01_a_head_without_the_scans_landmarks_is_one_error():
    from fields.scans.labels import check_landmark_sets

    job = SimpleNamespace(read=lambda item: _scan("bp4d83"), model=SimpleNamespace(landmarks={"static51": None}))
    with pytest.raises(ValueError, match="bp4d83_landmark_embedding.npz beside the head"):
        check_landmark_sets(job, {"F001": [0, 1], "F002": [2]})
    job.model.landmarks["bp4d83"] = None
    check_landmark_sets(job, {"F001": [0]})


def test_01_no_accepted_fit_is_an_error():
    from fields.scans.labels import ExpressionLabels

    zeros = np.zeros((2, 3), np.float32)
    labels = ExpressionLabels(
        np.array(["a", "b"]),
        np.array(["a", "b"]),
        np.zeros((2, 300), np.float32),
        np.zeros((2, 50), np.float32),
        *(zeros, zeros, zeros, zeros[:, 0], zeros[:, 0]),
        np.zeros(2, bool),
        np.array(["no identity: x", "no identity: x"]),
        "0" * 64,
    )
    with pytest.raises(ValueError, match="none of the 2 scans in fits could be fitted .2 x no identity"):
        labels.check_accepted("fits")
    labels.rejected[0] = ""
    labels.check_accepted("fits")


def test_01_expression_loss_without_labels_is_refused():
    from fields.data.mixing import check_expression_labels

    source = SimpleNamespace(has_expression=np.zeros(5, bool), split=np.array(["train"] * 5))
    with pytest.raises(ValueError, match="F2 needs expression labels"):
        check_expression_labels({"bp4d": source}, "F2")
    source.has_expression[2] = True
    check_expression_labels({"bp4d": source}, "F2")
    source.split[2] = "val"
    with pytest.raises(ValueError, match="F2 needs expression labels"):
        check_expression_labels({"bp4d": source}, "F2")


# 2: one rule for finding a file


@pytest.fixture
def clean_places(monkeypatch):
    for name in ("FIELDS_ASSETS", "FIELDS_DATA"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    # `settle` writes to the environment of its process
    os.environ.pop("FIELDS_ASSETS", None)


def test_02_one_rule_finds_head_side_files_and_data(tmp_path, clean_places):
    from fields.assets import find_asset
    from fields.places import data_folder, settle

    head, other = tmp_path / "heads" / "generic_model.pkl", tmp_path / "other"
    head.parent.mkdir()
    other.mkdir()
    head.touch()
    (head.parent / "FLAME_masks.pkl").touch()
    (other / "mica.tar").touch()
    settled = settle(load_profile("paper", [f"head={head}", f"assets={other}", "data=somewhere"]))
    assert settled.head == str(head) and settled.data.endswith("somewhere")
    assert find_asset("masks") == head.parent / "FLAME_masks.pkl"  # beside the head
    assert find_asset("mica") == other / "mica.tar"  # the folder that --set names
    clean_places.setenv("FIELDS_DATA", str(other))
    assert data_folder("data") == other and data_folder(str(tmp_path)) == tmp_path


def test_02_a_head_is_found_by_name_and_from_any_folder(tmp_path, clean_places):
    from fields.places import head_file, settle

    (tmp_path / "FLAME2020").mkdir()
    file = tmp_path / "FLAME2020" / "generic_model.pkl"
    file.touch()
    assert load_profile("paper").head == "flame2020"
    clean_places.setenv("FIELDS_ASSETS", f"{tmp_path / 'none'}{os.pathsep}{tmp_path}")
    clean_places.chdir("/")
    assert head_file("flame2020") == file and head_file("FLAME2020/generic_model.pkl") == file
    assert settle(load_profile("paper")).head == str(file)
    with pytest.raises(FileNotFoundError, match="--set head=PATH"):
        head_file("no/head.pkl")


# 6: the paper profile is the paper's experiment


def test_06_the_paper_profile_trains_every_row():
    rows = {"F1", "F2", "F3", "F4", "SMIRK", "TEASER", "EMOCA", "lambda0.5", "lambda1", "lambda10"}
    config = load_profile("paper")
    assert set(config.train.methods) == rows and config.loss.emotion == 5.0  # F4 is lambda 5


# 7: rows are independent


def test_07_a_row_depends_on_no_other_row():
    few, more = (load_profile("paper", [f"train.methods={rows}"]) for rows in ("F1", "F1,F4,lambda10"))
    for name in ("standins", "pretrain", "teaser", "train_F1"):
        one, two = ([s for s in plan(c) if s.name == name][0] for c in (few, more))
        assert one == two and settings_of(one, few) == settings_of(two, more), name
    longer = load_profile("paper", ["train.steps=1"])
    shared = [s for s in plan(longer) if s.name in ("pretrain", "teaser")]
    assert all(settings_of(s, longer) == settings_of(s, few) for s in shared)
    assert settings_of(method_step("F1"), longer) != settings_of(method_step("F1"), few)


def test_07_plots_and_comments_are_in_no_training_key(tmp_path):
    from fields.plan import NEUTRAL, executed_text, imported_modules, notebook_code

    pipeline = ROOT / "nbs" / "pipeline"
    for name in ("02_fit_scans", "03_prepare", "05_pretrain", "06_teaser", "07_train"):
        modules = imported_modules(notebook_code(pipeline / f"{name}.ipynb"), without=NEUTRAL)
        assert not {"fields.viz", "fields.evaluation.plots", "fields.evaluation.report"} & set(modules), name
    book = json.loads((pipeline / "07_train.ipynb").read_text())
    before = code_hash(pipeline / "07_train.ipynb")
    at = [n for n, c in enumerate(book["cells"]) if "## Results" in "".join(c["source"])][0]
    book["cells"][at + 1]["source"] = ["print('another plot')"]
    book["cells"][1]["source"] = [*book["cells"][1]["source"], "\n# a comment"]
    (tmp_path / "07_train.ipynb").write_text(json.dumps(book))
    assert code_hash(tmp_path / "07_train.ipynb") == before
    assert executed_text("x = 1  # one") == executed_text("x=1") != executed_text("x = 2")


# 10: counting streams


def test_10_counting_crops_holds_one_at_a_time(tmp_path):
    from fields.config import ScanConfig
    from fields.scans import labels

    items = [SimpleNamespace(id=f"bp4d/F001/T1/{k:04d}", scan=None) for k in range(40)]
    for item in items:
        points = np.zeros((100_000, 3), np.float32)  # 1.2 MB each
        labels.CroppedScan(points, np.zeros((83, 3)), "bp4d83", 200_000).save(labels.place(tmp_path, item.id))
    tracemalloc.start()
    report = labels.crop_dataset(items, ScanConfig(), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["points_kept"] == 4_000_000 and report["usable"] == 40
    assert peak < 12e6, "all crops were in memory together"


# 14: landmarks by frame number


@pytest.mark.parametrize(
    "offset, scans, rows, expected",
    [(0, [0, 1, 3], 4, [0, 1, 3]), (1, [1, 2, 4], 4, [0, 1, 3]), (1, [1, 2, 4], 5, [1, 2, 4])],
    ids=["lost picture", "scans from 1", "rows by scan number"],
)
def test_14_sequence_landmarks_go_by_frame_number(tmp_path, offset, scans, rows, expected):
    """Pictures 0, 1 and 3; picture 2 was lost, the landmark file of the sequence holds all frames."""
    from PIL import Image

    base = tmp_path / "bp4d"
    for folder in ("Sequences/F001/T1", "Scans/F001/T1", "3DFeatures"):
        (base / folder).mkdir(parents=True)
    for number in (0, 1, 3):
        Image.new("RGB", (40, 30)).save(base / "Sequences/F001/T1" / f"{number:03d}.jpg")
    for number in scans:
        (base / "Scans/F001/T1" / f"{number:04d}.obj").write_text("v 0 0 0\n")
    points = np.arange(rows)[:, None, None] + np.ones((rows, 83, 3))
    np.save(base / "3DFeatures" / "F001_T1.npy", points)
    items = open_dataset("bp4d", tmp_path, scan_offset=offset).items
    assert [i.landmarks3d_index for i in items] == expected
    assert [i.read_landmarks3d()[0, 0] - 1 for i in items] == expected
    assert [int(i.scan.stem) for i in items] == scans


# 15: compressed shards


def test_15_packed_crops_are_what_was_written(tmp_path):
    """The same rows as the raw array but for JPEG's rounding, in any order, and a tar file that others can read."""
    import tarfile

    from fields.data.crop import hull_mask
    from fields.data.packed import PackedImages, encode, write_shard

    rng = np.random.default_rng(0)
    grid = np.linspace(0, 255, 64).astype(np.uint8)
    pictures = [
        np.dstack([grid[:, None] + np.zeros(64, np.uint8), np.full((64, 64), 40 * k), grid[None] + 0 * grid[:, None]])
        for k in range(6)
    ]
    pictures = [p.astype(np.uint8) for p in pictures]
    points = rng.uniform(-0.6, 0.6, (6, 478, 2))
    points[3] = np.nan  # no face
    place = write_shard(
        tmp_path / "shards/000002.tar", 100, [b"" if k == 3 else encode(p, 95) for k, p in enumerate(pictures)]
    )
    np.save(tmp_path / "index.npy", np.c_[np.full((6, 1), 2), place])
    for threads in (1, 3):
        packed = PackedImages(tmp_path, points, 64, threads)
        crops = packed[np.array([5, 0, 3, 0])]
        assert crops.shape == (4, 64, 64, 4) and not crops[2].any()
        assert np.abs(crops[0, ..., :3].astype(int) - pictures[5]).mean() < 6
        assert (crops[0, ..., 3] == hull_mask(points[5], 64)).all() and (crops[1] == crops[3]).all()
    with tarfile.open(tmp_path / "shards/000002.tar") as tar:
        assert tar.getnames() == [f"{100 + k:09d}.jpg" for k in range(6) if k != 3]


# a run folder belongs to one profile and one set of settings


def test_a_run_is_not_overwritten_by_another_profile(tmp_path):
    run, pipeline = RunDir(tmp_path), ROOT / "nbs" / "pipeline"
    write_json(run / "config.json", to_dict(load_profile("demo")))
    write_json(run / "steps" / "world.json", {"key": "a", "digest": "b", "outputs": {}})
    with pytest.raises(ValueError, match="belongs to profile demo.*would lose world.*--force"):
        claim(run, load_profile("smoke"), pipeline)
    claim(run, load_profile("demo", ["workers=1", "train.methods=F1,F4,TEASER"]), pipeline)
    claim(run, load_profile("smoke"), pipeline, force=True)
    assert json.loads((run / "config.json").read_text())["profile"] == "smoke"


def test_unknown_parameters_are_refused_under_plain_papermill():
    from fields.stage import check_parameters

    cells = ["run: str = 'a'\nprofile: str = 'demo'", "# Parameters\nrun = 'b'\nprofil = 'smoke'\n"]
    with pytest.raises(ValueError, match="no parameter profil"):
        check_parameters(cells)


def test_a_log_has_lines(tmp_path, capsys, monkeypatch):
    """Where there is no terminal, progress is written as lines, and a silent step is reported too."""
    import sys
    import time

    from fields.chain import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    steps = plan(load_profile("smoke"))[:2]
    bar = Progress(RunDir(tmp_path), steps, 2, every=0.1)
    bar.begin(steps[0], 1)
    for done in (1, 2):
        write_json(tmp_path / "logs" / "progress_world.json", {"done": done, "total": 2, "label": "images"})
        time.sleep(0.7)
    bar.end(steps[0])
    bar.close()
    said = capsys.readouterr().err.splitlines()
    assert Counter("world" in line for line in said)[True] >= 4 and "\r" not in "".join(said)
    assert any("images 1/2" in line for line in said) and any("is done in" in line for line in said)


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
