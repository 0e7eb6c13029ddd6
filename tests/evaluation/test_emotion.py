"The emotion probe against independent implementations, hand-computed cases, and the rules of its folds."

import json, math
import numpy as np, pytest, torch
from scipy.stats import pearsonr
from sklearn import metrics as sk
from fake_run import fake_run, smoke_config
from fields.comparison import difference, macro_number, mean_number, number, resample, verdict
from fields.config import EvaluationConfig
from fields.evaluation.emotion import (
    Labels,
    classification,
    confusion,
    evaluate_emotion,
    fold_scores,
    init_probe,
    make_folds,
    probe,
    probe_loss,
    read_labels,
    regression,
    run_probe,
    ProbeResult,
)
from fields.types import EMOTIONS, Prediction

QUICK = EvaluationConfig(probe_width=24, probe_epochs=5, bootstrap=60)


@pytest.mark.parametrize("seed,classes", [(0, 7), (1, 7), (2, 3), (3, 2)])
def test_classification_agrees_with_sklearn(seed, classes):
    rng = np.random.default_rng(seed)
    true, said = rng.integers(0, classes, 60), rng.integers(0, classes, 60)
    ours = classification(confusion(true, said))
    assert ours["accuracy"][0] == pytest.approx(sk.accuracy_score(true, said))
    assert ours["precision"][0] == pytest.approx(sk.precision_score(true, said, average="macro", zero_division=0))
    assert ours["f1"][0] == pytest.approx(sk.f1_score(true, said, average="macro", zero_division=0))
    recall = sk.recall_score(true, said, average=None, labels=range(classes), zero_division=0)
    assert ours["recall"][0, :classes] == pytest.approx(recall)
    assert np.isnan(ours["recall"][0, classes:]).all()


def test_an_empty_class_and_one_never_predicted():
    true, said = [0, 0, 1, 1, 3], [0, 0, 0, 1, 1]
    ours = classification(confusion(true, said))
    assert ours["precision"][0] == pytest.approx(sk.precision_score(true, said, average="macro", zero_division=0))
    assert ours["f1"][0] == pytest.approx(sk.f1_score(true, said, average="macro", zero_division=0))
    assert math.isnan(ours["recall"][0, 2]) and ours["recall"][0, 3] == 0


@pytest.mark.parametrize("seed", range(4))
def test_regression_agrees_with_scipy_sklearn_and_torchmetrics(seed):
    from torchmetrics.functional import concordance_corrcoef

    rng = np.random.default_rng(seed)
    g = rng.uniform(-1, 1, 400)
    p = 0.7 * g + rng.normal(0, 0.3, 400) + 0.1
    ours = {k: v[0] for k, v in regression(g, p).items()}
    assert ours["PCC"] == pytest.approx(pearsonr(g, p).statistic)
    assert ours["RMSE"] == pytest.approx(math.sqrt(sk.mean_squared_error(g, p)))
    theirs = float(concordance_corrcoef(torch.tensor(p), torch.tensor(g)))
    assert ours["CCC"] == pytest.approx(theirs, abs=2 / 400)  # it divides by n - 1, we by n
    cov = np.cov(g, p, ddof=0)
    assert ours["CCC"] == pytest.approx(2 * cov[0, 1] / (cov[0, 0] + cov[1, 1] + (g.mean() - p.mean()) ** 2))
    assert ours["SAGR"] == pytest.approx((np.sign(g) == np.sign(p)).mean())


def test_sagr_zero_and_constants():
    assert regression([0.0, 0.5], [0.1, 0.5])["SAGR"][0] == 0.5  # a zero label agrees with no real number
    assert regression([0.0, 0.5], [0.0, 0.5])["SAGR"][0] == 1
    for value in (0.1, -1 / 3, 0.0):
        flat = regression([0.1, 0.5, -0.7], [value] * 3)
        assert flat["CCC"][0] == 0 and math.isnan(flat["PCC"][0])
    assert regression([0.2] * 3, [0.1, 0.2, 0.3])["CCC"][0] == 0  # a constant truth


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    true, said, g, p = rng.integers(0, 7, 30), rng.integers(0, 7, 30), rng.normal(size=30), rng.normal(size=30)
    for w in resample(30, 5, rng):
        rows = np.repeat(np.arange(30), w.astype(int))
        one, two = classification(confusion(true, said, w)), classification(confusion(true[rows], said[rows]))
        for k in ("accuracy", "precision", "f1"):
            assert one[k][0] == pytest.approx(two[k][0])
        one, two = regression(g, p, w), regression(g[rows], p[rows])
        for k in one:
            assert one[k][0] == pytest.approx(two[k][0])


@pytest.mark.parametrize("counts", [[20] * 7, [50, 40, 12, 9, 8, 7, 6], [5] * 7])
def test_folds(counts):
    classes = np.repeat(np.arange(7), counts)
    roles = make_folds(classes, 5, np.random.default_rng(3))
    assert roles.shape == (5, len(classes)) and set(np.unique(roles)) <= {0, 1, 2, 3}  # one number, so one role
    assert ((roles == 3).sum(0) <= 1).all()
    for role in roles:
        assert len(set(np.bincount(classes[role == 3], minlength=7))) == 1  # balanced
        assert len(set(classes[role == 1])) == 7 and len(set(classes[role == 2])) == 7
    share = np.array([np.bincount(classes[r != 1], minlength=7) for r in roles])
    assert (np.abs(share - share.mean(0)) <= 1.5).all()  # stratified
    assert (make_folds(classes, 5, np.random.default_rng(3)) == roles).all()
    assert (make_folds(classes, 5, np.random.default_rng(4)) != roles).any()


def test_too_few_samples_is_a_sentence():
    with pytest.raises(ValueError, match="class 1 has 3 samples; 5 folds need at least 5"):
        make_folds([0] * 9 + [1] * 3, 5, np.random.default_rng(0))


def reference_network(params, model, width):
    "The same network as plain layers."
    layers = []
    for k in range(4):
        w, b, gain, offset = (p[model] for p in params[4 * k : 4 * k + 4])
        linear, norm = torch.nn.Linear(*w.shape), torch.nn.BatchNorm1d(width)
        linear.weight.data, linear.bias.data, norm.weight.data, norm.bias.data = (
            w.T.clone(),
            b[0].clone(),
            gain[0].clone(),
            offset[0].clone(),
        )
        layers += [linear, norm, torch.nn.LeakyReLU(0.2)]
    last = torch.nn.Linear(width, params[-1].shape[-1])
    last.weight.data, last.bias.data = params[-2][model].T.clone(), params[-1][model][0].clone()
    return torch.nn.Sequential(*layers, last).double()


def test_batched_training_is_plain_training():
    from fields.evaluation.emotion import _Adam

    generator = torch.Generator().manual_seed(0)
    params = [p.double() for p in init_probe(3, 20, 8, 9, generator)]
    running = [t.double() for _ in range(4) for t in (torch.zeros(3, 1, 8), torch.ones(3, 1, 8))]
    plain = [reference_network(params, m, 8) for m in range(3)]
    rivals = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in plain]
    adam = _Adam(params, 1e-2)
    for step in range(6):
        x = torch.randn(3, 16, 20, generator=generator, dtype=torch.float64)
        classes, affect = (
            torch.randint(0, 7, (3, 16), generator=generator),
            torch.rand(3, 16, 2, generator=generator, dtype=torch.float64),
        )
        weights = torch.rand(3, 4, generator=generator, dtype=torch.float64)
        for p in params:
            p.requires_grad_(True)
        loss = probe_loss(run_probe(params, x, running, True), classes, affect, weights)
        grads = torch.autograd.grad(loss.sum(), params)
        params = [p.detach() for p in params]
        adam.update(params, grads)
        for m in range(3):
            out = plain[m](x[m])
            v, a = out[:, -2], out[:, -1]
            mse = [((v - affect[m, :, 0]) ** 2).mean(), ((a - affect[m, :, 1]) ** 2).mean()]
            pcc = [torch.corrcoef(torch.stack([q, g]))[0, 1] for q, g in ((v, affect[m, :, 0]), (a, affect[m, :, 1]))]
            ccc = [
                2
                * torch.cov(torch.stack([q, g]), correction=0)[0, 1]
                / (q.var(correction=0) + g.var(correction=0) + (q.mean() - g.mean()) ** 2)
                for q, g in ((v, affect[m, :, 0]), (a, affect[m, :, 1]))
            ]
            theirs = (
                torch.nn.functional.cross_entropy(out[:, :-2], classes[m])
                + (weights[m] * torch.stack([*mse, 1 - sum(pcc) / 2, 1 - sum(ccc) / 2])).sum()
            )
            assert float(loss[m]) == pytest.approx(float(theirs), rel=1e-6)
            rivals[m].zero_grad()
            theirs.backward()
            rivals[m].step()
    x = torch.randn(1, 16, 20, generator=generator, dtype=torch.float64).expand(3, -1, -1)
    ours = run_probe(params, x, running, False)
    for m in range(3):
        assert torch.allclose(ours[m], plain[m].eval()(x[m]), atol=1e-6)


def test_fold_scores_are_computed_once_over_each_fold():
    rng = np.random.default_rng(0)
    n = 70
    labels = Labels([str(i) for i in range(n)], np.tile(np.arange(7), 10), rng.uniform(-1, 1, n), rng.uniform(-1, 1, n))
    result = ProbeResult(np.repeat(np.arange(5), 14), rng.integers(0, 7, n), rng.normal(size=n), rng.normal(size=n), [])
    scores = fold_scores(labels, result, np.ones((1, n)))
    for f in range(5):
        at = result.fold == f
        assert scores["f1"][f, 0] == pytest.approx(
            sk.f1_score(labels.classes[at], result.classes[at], average="macro", zero_division=0)
        )
        assert scores["V-PCC"][f, 0] == pytest.approx(pearsonr(labels.valence[at], result.valence[at]).statistic)


def test_features_that_are_not_finite_are_an_error():
    x = torch.zeros(70, 355)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 70 samples"):
        probe(x, np.tile(np.arange(7), 10), np.zeros(70), np.zeros(70), QUICK)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    run, head = fake_run(tmp_path_factory.mktemp("emotion") / "run", heldout=15, methods=("F0", "F1", "F4"))
    return run, head, evaluate_emotion(run, smoke_config(), ["F0", "F1", "F4"], head)


def test_metrics_file(small):
    run, head, metrics = small
    held = metrics["protocols"]["heldout"]
    assert held["images"] == 105 and set(held["methods"]) == {"F0", "F1", "F4", "oracle"}
    for records in held["methods"].values():
        for k in (
            "accuracy",
            "precision",
            "f1",
            "V-PCC",
            "V-CCC",
            "V-RMSE",
            "V-SAGR",
            "A-PCC",
            "A-CCC",
            "A-RMSE",
            "A-SAGR",
        ):
            r = records[k]
            assert (
                {"mean", "std", "ci_low", "ci_high", "n"} <= set(r)
                and r["ci_low"] <= r["mean"] <= r["ci_high"]
                and r["std"] is not None
            )
        assert set(records["per_class"]) == set(EMOTIONS)
    assert held["methods"]["F0"]["accuracy"]["mean"] < held["methods"]["oracle"]["accuracy"]["mean"]
    assert verdict(held["differences"]["oracle-F0"]["accuracy"]) == "better"
    assert set(metrics["leakage"]) == set(held["methods"])


def test_controls_are_at_chance(small):
    for protocol in small[2]["protocols"].values():
        shuffled, constant, chance = (
            protocol["controls"]["shuffled"],
            protocol["controls"]["constant"],
            protocol["chance"],
        )
        assert abs(shuffled["accuracy"]["mean"] - 1 / 7) < chance["accuracy_band"] + 0.02
        assert (
            constant["accuracy"]["mean"] == pytest.approx(1 / 7, abs=1e-5)
            and constant["V-CCC"]["mean"] == 0
            and constant["V-PCC"]["mean"] is None
        )


def test_equal_inputs_give_equal_bytes(small):
    run, head, _ = small
    first = (run / "metrics" / "emotion.json").read_bytes()
    evaluate_emotion(run, smoke_config(), ["F0", "F1", "F4"], head)
    assert (run / "metrics" / "emotion.json").read_bytes() == first
    text = first.decode()
    assert str(run) not in text and "seconds" not in text


def test_held_out_images_that_were_trained_on_are_an_error(small, tmp_path):
    run, head, _ = small
    bad = Prediction.load(run / "predictions" / "F1_affectnet_train.npz")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "crops").symlink_to(run / "crops")
    bad.save(tmp_path / "predictions" / "F1_affectnet_val.npz")
    with pytest.raises(ValueError, match="are in the training split"):
        evaluate_emotion(tmp_path, smoke_config(), ["F1"], head)


def test_training_never_draws_a_held_out_image(small):
    "By ids: nothing that trains an encoder or a head is among the images of `heldout` or the BP4D test subjects."
    from fields.data.mixing import MixedData, Source
    from fields.data.prepare import CropStore
    from fields.types import DATASETS
    from types import SimpleNamespace

    run, head, metrics = small
    sources = {
        n: Source(n, store, SimpleNamespace(ids=store.rows["id"].astype(str).tolist()))
        for n in DATASETS
        for store in [CropStore(run / "crops" / n)]
    }
    data = MixedData(sources, None, smoke_config(), 32, 60)
    drawn = {
        (name, str(sources[name].store.rows["id"].iloc[row]))
        for step in range(60)
        for name, row in data.sampler.batch(step, data.stage(step))
    }
    for which in ("affectnet_val", "bp4d_test", "bp4d_val"):
        kept = set(Prediction.load(run / "predictions" / f"F4_{which}.npz").ids)
        assert kept and not kept & {i for _, i in drawn}, which
    labels, splits = read_labels(run)
    assert {i for n, i in drawn if n == "affectnet"} <= {i for i, s in splits.items() if s == "train"} and len(
        drawn
    ) > 100


def test_predictions_of_another_head_are_an_error(small, tmp_path):
    run, head, _ = small
    other = Prediction.load(run / "predictions" / "F1_affectnet_val.npz")
    other.head_sha256 = "0" * 64
    (tmp_path / "predictions").mkdir()
    (tmp_path / "crops").symlink_to(run / "crops")
    other.save(tmp_path / "predictions" / "F1_affectnet_val.npz")
    with pytest.raises(ValueError, match="not interchangeable"):
        evaluate_emotion(tmp_path, smoke_config(), ["F1"], head)


def test_external_predictions_enter_the_same_comparison(small, tmp_path):
    run, head, _ = small
    for name in ("predictions", "crops"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "external").mkdir()
    p = Prediction.load(run / "predictions" / "F1_affectnet_val.npz")
    np.savez(
        tmp_path / "external" / "EMOCA_affectnet_val.npz",
        ids=np.array(p.ids),
        shapecode=p.params.shape[:, :100].numpy(),
        expcode=p.params.expression.numpy(),
        posecode=torch.cat([p.params.rotation, p.params.jaw], 1).numpy(),
        head_sha256=head.sha256,
    )
    held = evaluate_emotion(tmp_path, smoke_config(**{"evaluation.protocols": "heldout"}), ["F1", "F4"], head)[
        "protocols"
    ]["heldout"]
    assert "EMOCA" in held["methods"] and "F4-EMOCA" in held["differences"]


def test_missing_files_are_sentences(tmp_path, small):
    with pytest.raises(ValueError, match="rows.csv is missing; run the step `prepare` first"):
        read_labels(tmp_path)
    (tmp_path / "crops").symlink_to(small[0] / "crops")
    with pytest.raises(ValueError, match="run the step `predict` first"):
        evaluate_emotion(tmp_path, smoke_config(), ["F1"], small[1])


def test_bootstrap_interval_covers():
    "About 95% of the intervals of a mean of 40 hold the truth."
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        r = mean_number(rng.normal(size=40), resample(40, 300, rng))
        hits += r["ci_low"] <= 0 <= r["ci_high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_differences():
    a, b = np.linspace(0.5, 0.6, 50), np.linspace(0.45, 0.55, 50)
    assert difference(0.55, 0.5, a, b)["resolved"] and not difference(0.55, 0.55, a, a[::-1])["resolved"]
    assert macro_number([1, 1, 1, 5], ["a", "a", "a", "b"], np.ones((3, 4)))["mean"] == 3
    assert number(float("nan"))["mean"] is None and json.dumps(number(1.0))
