"The speed of the evaluation on two cores, and whether the width of the probe changes its ranking; kept in evidence/evaluation_speed.json."

import json, os, time
from pathlib import Path
import numpy as np, pytest, torch
from fake_run import emotional, params_of
from fields.config import EvaluationConfig
from fields.evaluation.emotion import probe
from fields.evaluation.maps import embed

EVIDENCE = Path(__file__).parents[2] / "evidence" / "evaluation_speed.json"


def keep(**values):
    "Add measurements to the evidence file, with the load they were made under."
    old = json.loads(EVIDENCE.read_text()) if EVIDENCE.is_file() else {}
    entry = {
        k: v | {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
        for k, v in values.items()
    }
    EVIDENCE.write_text(json.dumps(dict(sorted((old | entry).items())), indent=1) + "\n")


def faces(n):
    "Features with labels of n invented faces."
    rng = np.random.default_rng(0)
    classes, affect, expression, jaw = emotional(rng, n)
    return classes, affect, rng.normal(size=(n, 300)), expression, jaw


def bench_probe(n=10_000):
    "Seconds and checks of the small probe on n samples in 5 folds."
    classes, affect, shape, expression, jaw = faces(n)
    features = params_of(np.random.default_rng(1), shape, expression, jaw, 1.0, 1.2).features
    start = time.perf_counter()
    result = probe(features, classes, *affect.T, EvaluationConfig())
    return {
        "samples": n,
        "folds": 5,
        "width": EvaluationConfig().probe_width,
        "seconds": round(time.perf_counter() - start, 1),
        "checks": result.checks,
    }


def bench_embeddings(n=4000):
    "Seconds of t-SNE and of UMAP (seeded, one thread) of n points."
    rng, result = np.random.default_rng(0), {"points": n}
    x = (rng.normal(0, 2, (7, 55))[rng.integers(0, 7, n)] + rng.normal(size=(n, 55))).astype(np.float32)
    for kind in ("tsne", "umap"):
        start = time.perf_counter()
        assert np.isfinite(embed(x, kind)).all()
        result[f"{kind}_seconds"] = round(time.perf_counter() - start, 1)
    return result


@pytest.mark.slow
def test_the_small_probe_is_fast():
    found = bench_probe()
    keep(probe=found)
    assert found["seconds"] < 45 or os.getloadavg()[0] > 3, "measured on a busy machine"


@pytest.mark.slow
def test_maps_are_fast():
    found = bench_embeddings()
    keep(embeddings=found)
    assert found["tsne_seconds"] + found["umap_seconds"] < 60 or os.getloadavg()[0] > 3, "measured on a busy machine"


@pytest.mark.slow
def test_maps_repeat():
    x = np.random.default_rng(0).normal(size=(300, 55)).astype(np.float32)
    for kind in ("tsne", "umap"):
        assert np.array_equal(embed(x, kind), embed(x, kind)), kind


@pytest.mark.slow
def test_width_does_not_change_the_ranking():
    "512 and 2048 wide, one seed: three methods of falling quality, each clearly apart, keep their order."
    classes, affect, shape, expression, jaw = faces(1050)
    accuracy = {}
    for width in (512, 2048):
        accuracy[width] = []
        for noise in (0.6, 1.2, 2.4):
            x = params_of(np.random.default_rng(1), shape, expression, jaw, 1.0, noise).features
            r = probe(x, classes, *affect.T, EvaluationConfig(probe_width=width, probe_epochs=15, folds=3))
            at = r.fold >= 0
            accuracy[width].append(round(float((r.classes == classes)[at].mean()), 4))
    keep(
        width={
            "samples": 1050,
            "folds": 3,
            "epochs": 15,
            "noise_of_the_methods": [0.6, 1.2, 2.4],
            "accuracy": {str(w): a for w, a in accuracy.items()},
        }
    )
    assert np.argsort(accuracy[512]).tolist() == np.argsort(accuracy[2048]).tolist()
