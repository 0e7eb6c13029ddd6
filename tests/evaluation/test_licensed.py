"""Official files: a FLAME head alone, and the lids with which SMIRK and TEASER were trained."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fields.assets import Notice
from fields.head.files import HeadFileError
from fields.head.flame import Head
from fields.types import HeadParams


@pytest.fixture
def flame(tmp_path, monkeypatch):
    """A FLAME-format file without its side files, and a cache of its own."""
    if not os.environ.get("FIELDS_TEST_DATA"):
        pytest.skip("FIELDS_TEST_DATA is not set")
    monkeypatch.setenv("FIELDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FIELDS_ASSETS", raising=False)
    source = Path(os.environ["FIELDS_TEST_DATA"]) / "head" / "generic_model.pkl"
    return Path(shutil.copy(source, tmp_path / "flame.pkl")), source


def test_a_flame_file_alone_gets_landmarks_and_lids(flame, tmp_path):
    alone, official = flame
    with pytest.warns(Notice, match="static51, .* lids, masks: carried over from the open head"):
        head = Head.load(alone)
    again = tmp_path / "cache" / "heads"
    assert len(list(again.iterdir())) == 1
    with pytest.warns(Notice):
        second = Head.load(alone)  # from the cache
    output, full = head(HeadParams.neutral()), Head.load(official)
    for name in ("static51", "mediapipe105", "points203"):
        points, there = head.landmarks(output, name), full.landmarks(full(HeadParams.neutral()), name)
        gap = 1000 * (points - there).norm(dim=-1)[0]
        assert gap.median() < 2, name
        assert torch.equal(points, second.landmarks(second(HeadParams.neutral()), name))
    assert full.carried == ("bp4d83",) and head.landmarks(output, "bp4d83").shape == (1, 83, 3)
    bare = Head.load(alone, carry=False)
    assert bare.carried == ()
    with pytest.raises(HeadFileError, match=r"put landmark_embedding\.npy beside"):
        bare.landmarks(bare(HeadParams.neutral()), "static51")


def test_side_files_are_found_in_the_asset_folder(flame, monkeypatch):
    alone, official = flame
    monkeypatch.setenv("FIELDS_ASSETS", str(official.parent))
    assert Head.load(alone).carried == ("bp4d83",)


def test_lids_mode_belongs_to_the_head():
    head, params = Head.load("open"), HeadParams.neutral()
    params.eyelids[:], params.rotation[:, 0] = 1.0, 0.35
    before = head(params).vertices
    head.eyelids_mode = "posed"
    after = head(params).vertices
    assert torch.equal(after, head(params, eyelids="posed").vertices)
    assert np.isclose(1000 * float((before - after).norm(dim=-1).max()), 3.5, atol=2.5)
    assert torch.equal(before, head(params, eyelids="before").vertices)
