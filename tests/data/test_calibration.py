"""The demo world's emotions: frozen constants, and what the oracle scores with them."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fields.config import fingerprint
from fields.data.population import CONSTANTS
from fields.evaluation.calibration import BARS, CALIBRATION_SEED, freeze, measure_oracle, oracle_set

EVIDENCE = Path(__file__).parents[2] / "evidence" / "oracle_calibration.json"


def test_the_world_is_the_calibrated_one():
    """The constants the world uses are those that were measured; changing one asks for a new measurement and a new version."""
    known = json.loads(EVIDENCE.read_text())
    assert (
        known["constants"] == asdict(CONSTANTS)
        and known["version"] == CONSTANTS.version
        and known["fingerprint"] == fingerprint(asdict(CONSTANTS))
    )
    assert 650 <= known["images"] <= 700 and all(
        low <= known["oracle"][k]["mean"] <= high for k, (low, high) in BARS.items()
    )
    assert known["shuffled"]["accuracy"]["mean"] < 0.2 < known["oracle"]["accuracy"]["mean"]


def test_oracle_set_is_drawn_from_its_seed():
    first, again, other = oracle_set(2), oracle_set(2), oracle_set(2, seed=CALIBRATION_SEED + 1)
    assert (first[0].expression == again[0].expression).all() and (first[0].expression != other[0].expression).any()
    assert (
        len(first[0]) == 14 and np.isfinite(first[0].features.numpy()).all() and np.abs(np.stack(first[2:])).max() <= 1
    )


@pytest.mark.slow
def test_oracle_reaches_the_bars():
    """700 images, as many as the held-out set of the demo world, by the protocol of all methods."""
    measured = measure_oracle()
    freeze(EVIDENCE, CONSTANTS.version, asdict(CONSTANTS), measured)
    assert measured.good
