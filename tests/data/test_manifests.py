"""Manifests: the seven files, the paper's numbers in them, and what a faulty file says."""

import re
from pathlib import Path

import pytest
import yaml

from fields.config import MixingConfig
from fields.manifests import describe, load_manifest, manifest_folder, manifest_names, parse_manifest
from fields.types import DATASETS, EMOTIONS

TEXT = {n: (manifest_folder() / f"{n}.yaml").read_text(encoding="utf-8") for n in manifest_names()}


def test_all_six_are_there():
    assert set(DATASETS) <= set(manifest_names()) and set(manifest_names()) - set(DATASETS) == {"identity"}
    for name in manifest_names():
        m = load_manifest(name)
        assert m.licence and m.ask and m.citation and m.layout.tree and m.checks is not None
        assert name == "identity" or m.source.startswith("https://")
        assert m.title in describe(m) and m.licence in describe(m)


def test_sampling_is_the_papers():
    mixing = MixingConfig()
    shares = {n: load_manifest(n).sampling for n in DATASETS}
    assert abs(sum(s.share for s in shares.values()) - 1) < 1e-9
    assert shares["bp4d"].share == mixing.bp4d_second and shares["bp4d"].first_stage == mixing.bp4d_first
    assert all(shares[n].share == getattr(mixing, n) for n in DATASETS if n != "bp4d")


def test_bp4d_is_the_papers():
    m = load_manifest("bp4d")
    everyone = [f"F{k:03d}" for k in range(1, 24)] + [f"M{k:03d}" for k in range(1, 19)]
    assert sorted(m.splits.train + m.splits.val + m.splits.test) == everyone
    assert m.splits.val == ["F014", "F019", "F023", "M003", "M008", "M009"] and m.splits.test == [
        "F010",
        "F011",
        "F021",
        "M004",
        "M005",
        "M017",
    ]
    assert (m.counts.train, m.counts.val, m.counts.test) == (269161, 50455, 47734)
    strata = {s: [m.stratum(p)[0] for p in getattr(m.splits, s)] for s in ("train", "val", "test")}
    six = sorted(f"{r}_{g}" for r in ("Asian", "White", "Black") for g in "FM")
    assert sorted(strata["val"]) == six and sorted(strata["test"]) == six
    assert {k: round(strata["train"].count(k) / 29, 3) for k in set(strata["train"])} == {
        "White_M": 0.414,
        "White_F": 0.241,
        "Asian_F": 0.207,
        "Black_F": 0.138,
    }
    assert {m.stratum(p)[1] for p in m.splits.val + m.splits.test} == {"paper"} and {
        m.stratum(p)[1] for p in m.splits.train
    } == {"ours"}
    assert all(m.stratum(p)[0][-1] == p[0] for p in everyone)
    assert m.splits.of("X001") == "" and m.stratum("X001") == ("", "")


def test_affectnet_classes_are_ours():
    label = load_manifest("affectnet").label("emotion")
    assert tuple(label.values[k] for k in range(7)) == EMOTIONS and set(label.dropped) == {7, 8, 9, 10}
    counts = load_manifest("affectnet").counts
    assert counts.train == 74874 + 134415 + 25459 + 14090 + 6378 + 3803 + 24882 and counts.val == 3500


def test_splits_do_not_overlap():
    for name in DATASETS:
        s = load_manifest(name).splits
        assert not set(s.train) & set(s.val) and not set(s.val) & set(s.test) and not set(s.train) & set(s.test)


FAULTS = {
    "not yaml": ("name: lrw", "name: [lrw", "is not YAML"),
    "a list": (None, "- 1\n- 2\n", "must be a group of keys"),
    "empty": (None, "", "must be a group of keys"),
    "unknown key": ("licence:", "license:", "unknown key 'license'"),
    "unknown inner key": ("  folder: lrw", "  folders: lrw", "lrw.yaml.layout has the unknown key 'folders'"),
    "missing key": ("title: LRW, Lip Reading in the Wild\n", "", "lacks the key 'title'"),
    "missing inner key": ("  folder: lrw\n", "", "layout lacks the key 'folder'"),
    "twice": ("name: lrw", "name: lrw\nname: lrw", "the key 'name' twice"),
    "text for a number": ("frames_per_clip: 29", "frames_per_clip: many", "must be of type int"),
    "true for a number": ("frames_per_clip: 29", "frames_per_clip: true", "must be of type int"),
    "fraction for a count": ("test: 25000", "test: 2.5", "must be of type int"),
    "negative count": ("test: 25000", "test: -1", "is negative"),
    "share too large": ("share: 0.20", "share: 20", "lies between 0 and 1"),
    "share negative": ("share: 0.20", "share: -0.2", "lies between 0 and 1"),
    "share text": ("share: 0.20", "share: a fifth", "must be of type float"),
    "parent folder": ("folder: lrw", "folder: ../lrw", "without '..'"),
    "hidden parent": ("[lipread_mp4]", "[a/../../b]", "without '..'"),
    "absolute": ("folder: lrw", "folder: /data/lrw", "must be relative"),
    "backslash": ("folder: lrw", "folder: 'a\\b'", "use '/'"),
    "drive": ("folder: lrw", "folder: 'c:/lrw'", "must be relative"),
    "suffix": ("clips: [.mp4]", "clips: [mp4]", "starts with a dot"),
    "capital suffix": ("clips: [.mp4]", "clips: [.MP4]", "small letters"),
    "counts of": ("of: clips", "of: hours", "must be one of images, clips"),
    "split by": ("by: folder", "by: dice", "splits.by is 'dice'"),
    "role is no list": ("clips: [lipread_mp4]", "clips: lipread_mp4", "must be a list"),
    "check without reason": (", why: every clip has 29 frames", "", "lacks the key 'why'"),
    "python object": ("name: lrw", "name: !!python/object/apply:os.getcwd []", "is not YAML"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_in_a_manifest(case):
    old, new, sentence = FAULTS[case]
    assert old is None or old in TEXT["lrw"], "the fault does not apply"
    with pytest.raises(ValueError) as error:
        parse_manifest(TEXT["lrw"].replace(old, new, 1) if old else new, "lrw.yaml")
    assert sentence in str(error.value) and str(error.value).startswith("lrw.yaml") and "\n" not in str(error.value)


SUBJECT_FAULTS = {
    "twice": ("test: [F010", "test: [F014, F010", "names the subject F014 twice"),
    "stratum of nobody": ("F014: Asian_F", "F999: Asian_F", "names F999, who is in no split"),
    "unit": ("unit: mm", "unit: inch", "layout.unit"),
    "label kind": ("kind: scan", "kind: mesh", "does not exist"),
}


@pytest.mark.parametrize("case", SUBJECT_FAULTS)
def test_faults_in_splits(case):
    old, new, sentence = SUBJECT_FAULTS[case]
    assert old in TEXT["bp4d"]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_manifest(TEXT["bp4d"].replace(old, new, 1), "bp4d.yaml")


def test_names_and_files_agree(tmp_path):
    (tmp_path / "other.yaml").write_text(TEXT["lrw"])
    with pytest.raises(ValueError, match="calls itself 'lrw'"):
        load_manifest(tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="there is one for affectnet, bp4d"):
        load_manifest("imagenet")
    (tmp_path / "lrw.yaml").write_text(TEXT["lrw"])
    assert load_manifest(tmp_path / "lrw.yaml").name == "lrw"


def test_packaged_copy_is_found(monkeypatch, tmp_path):
    """An installed package without its repository carries the files inside `fields`."""
    import fields.manifests as module

    inside = tmp_path / "fields" / "data_manifests"
    inside.mkdir(parents=True)
    for name, text in TEXT.items():
        (inside / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(module, "find_root", lambda: None)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "fields" / "manifests.py"))
    assert module.manifest_folder() == inside and module.load_manifest("mead").name == "mead"
    monkeypatch.setattr(module, "__file__", str(tmp_path / "elsewhere" / "manifests.py"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        module.manifest_folder()


def test_files_are_plain_ascii_yaml():
    for name, text in TEXT.items():
        assert text.isascii() and isinstance(yaml.safe_load(text), dict), name
        assert Path(load_manifest(name).path).name == f"{name}.yaml"


def test_sources_that_are_no_datasets_say_where_they_come_from():
    import yaml

    folder = Path(__file__).parents[1] / "data_manifests" / "sources"
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")}
    assert set(found) == {"anny", "portraits", "photographs"}
    for name, source in found.items():
        assert source["name"] == name and all(source[k] for k in ("title", "source", "licence", "ask", "used_for"))
        assert all(len(digest) == 64 for digest in source["files"].values())
