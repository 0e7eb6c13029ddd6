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
