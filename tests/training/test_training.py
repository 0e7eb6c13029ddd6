"Training: what is frozen stays, resume is exact, processes agree, the guard speaks, methods differ only where they say."

import copy, dataclasses, json, os, signal, subprocess, sys, time
import numpy as np, pytest, torch
from pathlib import Path
from fake_data import fake_sources, prepared, small_config
from fields.config import Config
from fields.data.mixing import MixedData
from fields.head.flame import Head
from fields.models.fields import FieldsModel
from fields.models.perceptual import SmallEmotion, SmallPerceptual
from fields.training.alternate import Alternating
from fields.training.cycle import templates_of
from fields.training.log import Diverged, Log, Report, guard, read_log
from fields.training.loop import Moment, Pass, Setting, load_state, run_pass, save_state, train, training_only
from fields.training.losses import Terms
from fields.training.methods import run_method
from fields.training.rows import INITIAL_NAME, METHODS
from fields.training.starts import starting_model
from fields.training.pretrain import iterations, validation_batches
from fields.training.team import Team

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


@pytest.fixture(scope="module")
def sources(head):
    return fake_sources(head)


def build(head, sources, method, **changes):
    "Model, job, passes and one sample of a method."
    torch.set_num_threads(1)
    config = small_config(**changes)
    m = METHODS[method]
    model = FieldsModel(config.network, head, "teaser" if m.use_tokens else "smirk", m.use_emotion, seed=0)
    base = copy.deepcopy(model.encoders)
    torch.manual_seed(0)
    job = Alternating(model, head, base, m, config, SmallPerceptual(), templates_of(sources["bp4d"]), SmallEmotion())
    data = MixedData(sources, None, config, config.train.batch, 90)
    moment, samples = iterations(data, 1, Team(), job.prepare)(0)
    return model, job, job.passes(), moment, samples


def parts(model):
    e = model.encoders
    named = {
        "pose": e.pose_encoder,
        "shape": e.shape_encoder,
        "expression": e.expression_encoder,
        "tokens": model.token_encoder,
        "synthesizer": model.synthesizer,
        "emotion": model.emotion_head,
    }
    return {n: m for n, m in named.items() if m is not None}


def snapshot(model):
    return {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in parts(model).items()}


def changed(model, before):
    return {
        n for n, m in parts(model).items() if any(not torch.equal(v, before[n][k]) for k, v in m.state_dict().items())
    }


@pytest.mark.parametrize(
    "method, parts_option, learns",
    [
        ("F1", "fig3", {"shape", "expression", "tokens"}),
        ("F4", "fig3", {"shape", "expression", "tokens", "emotion"}),
        ("F4", "sec33", {"expression", "emotion"}),
        ("SMIRK shared", "fig3", {"shape", "expression"}),
        ("EMOCA", "fig3", {"shape", "expression", "tokens"}),
    ],
)
def test_each_pass_changes_what_it_names_and_nothing_else(head, sources, method, parts_option, learns):
    name, *shared = method.split()
    changes = {"train.train_parts": parts_option, **({"train.rows": "shared"} if shared else {})}
    model, job, (encoder, synthesizer), moment, samples = build(head, sources, name, **changes)
    frozen = [job.base, job.perceptual, job.emotion_net, head]
    outside = [t.clone() for m in frozen if m is not None for t in m.state_dict().values()]
    before = snapshot(model)
    run_pass(model, encoder, samples, moment, Team())
    assert changed(model, before) == learns
    before = snapshot(model)
    run_pass(model, synthesizer, samples, moment, Team())
    assert changed(model, before) == {"synthesizer"}
    assert all(
        torch.equal(a, b)
        for a, b in zip(outside, (t for m in frozen if m is not None for t in m.state_dict().values()))
    )
    assert all(p.grad is None for m in frozen if m is not None for p in m.parameters())


def test_no_gradient_reaches_what_is_frozen(head, sources):
    model, job, (encoder, synthesizer), moment, samples = build(head, sources, "F4")
    for one, learns in ((encoder, {"shape", "expression", "tokens", "emotion"}), (synthesizer, {"synthesizer"})):
        model.zero_grad(set_to_none=True)
        with training_only(model, one.trained):
            one.loss(samples[0], moment)[0].backward()
            assert {n for n, m in parts(model).items() if any(m.modules()) and next(m.modules()).training} == learns
        assert {n for n, m in parts(model).items() if any(p.grad is not None for p in m.parameters())} == learns
        graded = [p for m in one.trained for p in m.parameters()]
        assert sum(p.grad is not None and bool(p.grad.any()) for p in graded) > 0.5 * len(graded)
    assert all(p.requires_grad for p in model.parameters()), "flags are restored"


def test_batchnorm_statistics_of_frozen_parts_stand_still():
    "A network made of BatchNorm, run inside a frozen part, keeps its statistics to the bit; a trained one does not."
    net = torch.nn.ModuleDict({k: torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)) for k in "ab"})
    before = {k: {n: t.clone() for n, t in net[k].state_dict().items()} for k in "ab"}
    with training_only(net, [net["a"]]):
        net["b"](net["a"](torch.rand(2, 3, 8, 8))).sum().backward()
    assert all(torch.equal(t, before["b"][n]) for n, t in net["b"].state_dict().items())
    assert not torch.equal(net["a"][1].running_mean, before["a"]["1.running_mean"])
    assert net["a"].training and net["b"].training


def test_terms_of_each_method(head, sources):
    common = {"photometric", "perceptual", "landmark", "expression_reg"}
    expected = {
        "F1": common | {"pose_landmark", "region", "shape_reg"},
        "F2": common | {"pose_landmark", "region", "shape_reg", "expression_3d"},
        "F3": common | {"pose_landmark", "region", "shape_reg", "emotion"},
        "SMIRK": common | {"jaw_reg"},
        "TEASER": common | {"pose_landmark", "region", "jaw_reg"},
        "EMOCA": common | {"pose_landmark", "region", "shape_reg", "feature"},
    }
    expected["F4"] = expected["F2"] | expected["F3"]
    for method, names in expected.items():
        model, job, _, moment, samples = build(head, sources, method)
        with torch.no_grad():
            terms = dict(job.encoder_loss(samples[0], moment)[1].present())
            assert set(terms) == names, method
            assert all(torch.isfinite(v) for v in terms.values())
            second = set(dict(job.synthesizer_loss(samples[0], moment)[1].present()))
            assert second == {"photometric", "perceptual", "cycle"} | (
                {"region"} if METHODS[method].use_regions else set()
            ) | ({"token_cycle"} if METHODS[method].use_tokens else set())


def test_smirk_schedule(head, sources):
    model, job, passes, moment, samples = build(head, sources, "F1", **{"train.passes": "smirk"})
    joint, even, odd = passes
    assert [p.every(0) for p in passes] == [True, True, False] and [p.every(1) for p in passes] == [True, False, True]
    before = snapshot(model)
    names, _ = run_pass(model, joint, samples, moment, Team())
    assert changed(model, before) == {"shape", "expression", "tokens", "synthesizer"} and "joint.token_cycle" in names
    for one, learns in ((even, {"synthesizer"}), (odd, {"expression", "shape"})):
        before = snapshot(model)
        run_pass(model, one, samples, moment, Team())
        assert changed(model, before) <= learns | {"tokens"} and changed(model, before)


def test_visible_landmarks_and_hull_regions(head, sources):
    model, job, (encoder, _), moment, samples = build(
        head, sources, "F1", **{"train.pdl": "visible", "train.region": "hull"}
    )
    terms = dict(job.encoder_loss(samples[0], moment)[1].present())
    assert torch.isfinite(terms["pose_landmark"]) and terms["pose_landmark"] > 0 and terms["region"] > 0
    terms["pose_landmark"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.encoders.expression_encoder.parameters())


def test_accumulated_batches_make_one_step(head, sources):
    "Two batches of 8 in one step give the gradient of their mean, divided by the labels of both."
    model, job, (encoder, _), moment, samples = build(head, sources, "F4")
    config = small_config(**{"train.accumulate": 2})
    data = MixedData(sources, None, config, 8, 180)
    moment, both = iterations(data, 2, Team(), job.prepare)(5)
    assert len(both) == 2 and both[0].batch.ids == data.batch(10).ids and both[1].batch.ids == data.batch(11).ids
    assert moment.counts.expression == sum(int(s.batch.has_expression.sum()) for s in both) / 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, head, sources):
    path = tmp_path_factory.mktemp("run")
    prepared(path, head, sources)
    return path


def copied(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_pretraining_selects_and_saves(run, head):
    summary = json.loads((run / "checkpoints/F0/summary.json").read_text())
    assert summary["selected_step"] in (2, 4) and summary["validation"] > 0
    model = FieldsModel.load(run / "checkpoints/F0/model.safetensors", head)
    assert model.emotion_head is None and not list((run / "checkpoints/F0").glob("state_*"))
    log = read_log(run / "checkpoints/F0/log.csv")
    assert log["pretrain.landmark"][0] == [0, 1, 2, 3] and "validation" not in log or True


def test_methods_start_where_they_should(run, head):
    config = small_config()
    first, base = starting_model(run, METHODS["F4"], config, head)
    initial = FieldsModel.load(run / "checkpoints" / INITIAL_NAME / "model.safetensors", head)
    f0 = FieldsModel.load(run / "checkpoints/F0/model.safetensors", head)
    same = lambda a, b: all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert same(first.encoders, f0.encoders) and same(base, f0.encoders)
    assert same(first.token_encoder, initial.token_encoder) and same(first.synthesizer, initial.synthesizer)
    again, _ = starting_model(run, METHODS["F3"], config, head)
    assert same(first.emotion_head, again.emotion_head)
    smirk, _ = starting_model(run, METHODS["SMIRK"], config, head)
    assert smirk.token_encoder is None and same(smirk.encoders, f0.encoders)


def same_files(a, b, method="F4"):
    "Are the checkpoints' tensors and the logs the same, bit for bit? (The order of a file's header is not fixed.)"
    from fields.models.fields import read_tensors

    x, y = (read_tensors(p / f"checkpoints/{method}/model.safetensors")[0] for p in (a, b))
    logs = [(p / f"checkpoints/{method}/log.csv").read_bytes() for p in (a, b)]
    return {"model": set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x), "log": logs[0] == logs[1]}


def test_resume_is_exact(run, tmp_path, head, sources):
    "6 iterations equal 3, a stop, and 3 more: weights, optimiser-driven log and all."
    whole, parts_ = copied(run, tmp_path / "a"), copied(run, tmp_path / "b")
    config = small_config()
    run_method(whole, "F4", config, head, sources)
    run_method(parts_, "F4", config, head, sources, stop_at=3)
    assert len(list((parts_ / "checkpoints/F4").glob("state_0000003"))) == 1
    assert run_method(parts_, "F4", config, head, sources).resumed == 3
    assert same_files(whole, parts_) == {"model": True, "log": True}
    assert (whole / "checkpoints/F4/summary.json").read_bytes() == (parts_ / "checkpoints/F4/summary.json").read_bytes()


def test_state_of_another_configuration_is_not_continued(run, tmp_path, head, sources):
    path = copied(run, tmp_path)
    run_method(path, "F1", small_config(), head, sources, stop_at=3)
    assert run_method(path, "F1", small_config(**{"loss.region": 1.0}), head, sources).resumed == 0


def test_missing_parts_are_named(tmp_path, head, sources):
    with pytest.raises(ValueError, match="`pretrain` step first"):
        run_method(tmp_path, "F1", small_config(), head, sources)
    with pytest.raises(ValueError, match="unknown method 'F9'"):
        run_method(tmp_path, "F9", small_config(), head, sources)
    with pytest.raises(ValueError, match="train.train_parts='all'"):
        build(head, sources, "F1", **{"train.train_parts": "all"})


def test_select_best(run, tmp_path, head, sources):
    path = copied(run, tmp_path)
    outcome = run_method(path, "F2", small_config(**{"train.select": "best"}), head, sources)
    assert outcome.best_step in (3, 6) and np.isfinite(outcome.best)
    assert not (path / "checkpoints/F2/best.safetensors").exists()


def test_nothing_is_selected_on_affectnet(head, sources):
    data = MixedData(sources, None, small_config(), 8, 10)
    seen = {i.split("/")[0] for b in validation_batches(data) for i in b.ids}
    assert "affectnet" not in seen and "bp4d" in seen


def test_killed_while_writing_leaves_the_old_state(tmp_path):
    net = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(net.parameters())
    save_state(tmp_path, net, [adam], 5, {"key": "k"})
    half = tmp_path / ".state.999.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert load_state(tmp_path, net, [adam], "k")["step"] == 5
    (tmp_path / "state_0000005" / "optimizer.pt").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="delete that folder"):
        load_state(tmp_path, net, [adam], "k")


def test_guard_names_term_and_step(tmp_path):
    net = torch.nn.Linear(1, 1)

    def loss(x, moment):
        value = net(x).square().mean()
        return value, Terms(landmark=value, region=value * (float("nan") if moment.step == 4 else 1))

    one = Pass("encoder", [net], loss, [torch.optim.SGD(net.parameters(), 0.01)])
    feed = lambda step: (Moment(step), [torch.ones(2, 1)])
    with pytest.raises(Diverged, match=r"encoder.region became nan at step 4 of F2; the last checkpoint is intact"):
        train(net, [one], feed, Setting(8, tmp_path, "F2", checkpoint_every=2))
    assert load_state(tmp_path, net, one.optimizers)["step"] == 4
    with pytest.raises(Diverged, match="inf"):
        guard(1, {"a.objective": float("inf")})
    assert len(read_log(tmp_path / "log.csv")["encoder.landmark"][0]) == 4


def test_reports_and_logs(tmp_path):
    net, seen = torch.nn.Linear(1, 1), []

    def loss(x, moment):
        return (v := net(x).square().mean()), Terms(landmark=v)

    one = Pass("p", [net], loss, [torch.optim.SGD(net.parameters(), 0.01)])
    train(
        net,
        [one],
        lambda s: (Moment(s), [torch.ones(2, 1)]),
        Setting(10, tmp_path, flush_every=3, events=tmp_path / "events"),
        callbacks=(seen.append,),
    )
    assert [r.step for r in seen] == [3, 6, 9, 10] and seen[-1].left == 0 and isinstance(seen[0], Report)
    assert read_log(tmp_path / "log.csv")["p.landmark"][0] == list(range(10))
    assert list((tmp_path / "events").glob("events.out.tfevents*"))
    with pytest.raises(ValueError, match="is missing"):
        read_log(tmp_path / "none.csv")


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    "Gradients of the first step to 1e-9, parameters after three steps of Adam with clipping, float64, BatchNorm learning."
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    saved = {}
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/two_processes.py"), str(out), str(world)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        saved[world] = torch.load(out, weights_only=True)
    relative = lambda a, b: max(
        float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-30))
        for k in b
        if b[k].is_floating_point() and b[k].norm() > 0
    )
    gradients, parameters = (
        relative(saved[2]["grads"], saved[1]["grads"]),
        relative(saved[2]["params"], saved[1]["params"]),
    )
    from fields.files import write_json

    write_json(
        ROOT / "evidence/two_processes.json",
        {
            "gradients_relative": gradients,
            "parameters_relative_after_3_steps": parameters,
            "tensors": len(saved[1]["grads"]),
            "how": "pytest -m slow tests/training/test_training.py: float64, gloo, global batch 8, F4, Adam and clipping as in a run, BatchNorm synchronised",
        },
    )
    assert set(saved[1]["grads"]) == set(saved[2]["grads"]) and gradients < 1e-9 and parameters < 1e-5
    assert "2 processes; the statistics of" in saved[2]["notes"]


@pytest.mark.slow
def test_twenty_iterations_equal_ten_a_kill_and_ten(run, tmp_path, head, sources):
    "The second half runs after a SIGKILL of the process that ran the first."
    config = {"train.steps": 20, "train.checkpoint_every": 5}
    whole, killed = copied(run, tmp_path / "a"), copied(run, tmp_path / "b")
    run_method(whole, "F4", small_config(**config), head, sources)
    script = (
        "import torch; from fake_data import *; from fields.head.flame import Head; from fields.training.methods import run_method; import sys;"
        f"head = Head.load('open'); run_method(sys.argv[1], 'F4', small_config(**{config!r}), head, fake_sources(head))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script, str(killed)], env=environment, stderr=subprocess.DEVNULL)
    log, start = killed / "checkpoints/F4/log.csv", time.time()
    while (
        time.time() - start < 400
        and child.poll() is None
        and (not log.is_file() or len(log.read_text().splitlines()) < 13)
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lines = len(log.read_text().splitlines()) - 1
    assert lines < 20, "the child finished before it was killed"
    outcome = run_method(killed, "F4", small_config(**config), head, sources)
    assert outcome.resumed == 10
    equal = same_files(whole, killed)
    from fields.files import write_json

    write_json(
        ROOT / "evidence/resume.json",
        {
            "iterations": 20,
            "killed_after": lines,
            "resumed_at": outcome.resumed,
            "identical": equal,
            "how": "pytest -m slow tests/training/test_training.py: F4 on invented data, one thread, SIGKILL",
        },
    )
    assert all(equal.values())


@pytest.mark.slow
def test_paper_profile_runs_two_iterations(tmp_path):
    "The paper's exact networks, image size and schedule, batch 4, with the scan-derived head: every logged term is finite."
    folder = os.environ.get("FIELDS_TEST_DATA")
    if not folder:
        pytest.skip("FIELDS_TEST_DATA is not set, so there is no FLAME-topology head to run the paper profile with")
    from fields.config import load_profile
    from fields.models.fields import FieldsModel

    path = Path(folder) / "head/generic_model.pkl"
    config = load_profile(
        "paper",
        {"head": str(path), "train.batch": 4, "train.steps": 2, "train.precision": "32", "device": "cpu", "threads": 0},
    )
    real = Head.load(str(path))
    sources, torch_seed = fake_sources(real, size=config.prepare.cache_size), torch.manual_seed(0)
    model = FieldsModel(config.network, real, seed=0)
    assert (
        sum(p.numel() for p in model.synthesizer.parameters()) == 85_224_355
        and sum(p.numel() for p in model.encoders.parameters()) == 3_599_921
    )
    from fields.models.perceptual import Vgg16

    job = Alternating(
        model, real, copy.deepcopy(model.encoders), METHODS["F4"], config, Vgg16(), templates_of(sources["bp4d"])
    )
    data = MixedData(sources, None, config, 4, config.train.steps)
    outcome = train(model, job.passes(), iterations(data, 1, Team(), job.prepare), Setting(2, tmp_path, "F4"))
    log = read_log(tmp_path / "log.csv")
    assert outcome.steps == 2 and all(len(v) == 2 and np.isfinite(v).all() for _, v in log.values())
    from fields.files import write_json

    write_json(
        ROOT / "evidence/paper_profile.json",
        {
            "iterations": 2,
            "batch": 4,
            "image_size": config.network.image_size,
            "terms": {k: v for k, (_, v) in log.items()},
            "how": "pytest -m slow tests/training/test_training.py with FIELDS_TEST_DATA: scan-derived head, rendered heads at 224 px, VGG16 with random weights",
        },
    )


def test_pretraining_may_end_where_its_schedule_ends(tmp_path, head, sources):
    "`pretrain.select=last` keeps the last weights, whatever validation said; another word is refused."
    from fields.training.pretrain import pretrain
    from fields.models.encoders import GeometryEncoders

    def ended(select, steps=4):
        torch.manual_seed(0)
        config = small_config(**{"pretrain.select": select, "pretrain.steps": steps})
        encoders = GeometryEncoders(config.network)
        outcome = pretrain(
            tmp_path / f"{select}{steps}",
            encoders,
            head,
            MixedData(sources, None, config, config.pretrain.batch, 4),
            config,
        )
        return encoders.state_dict(), outcome.best_step

    last, step = ended("last")
    best, chosen = ended("best")
    assert step == 0 and chosen in (2, 4)
    same = all(torch.equal(last[k], best[k]) for k in last)
    assert same == (chosen == 4)
    with pytest.raises(ValueError, match="pretrain.select='first' is unknown"):
        ended("first")


def test_reading_once_changes_nothing_but_rounding(head, sources):
    """Frozen backbones that are the same read each image once; the gradients of an iteration agree up to the order of two sums."""
    from fields.models.encoders import branches, reading_once

    found, calls = [], []
    for shared in (False, True):
        model, job, passes, moment, _ = build(head, sources, "F4", **{"train.backbone_lr_scale": 0.0})
        every, seen, gradients = branches(model, job.base), [], {}
        for b in every:
            b.encoder.load_state_dict(every[0].encoder.state_dict())
            b.encoder.pooled = lambda image, pooled=b.encoder.pooled, seen=seen: (seen.append(1), pooled(image))[1]
        with reading_once(every if shared else []):
            moment, samples = iterations(
                MixedData(sources, None, job.config, job.config.train.batch, 90), 1, Team(), job.prepare
            )(0)
            for one in passes:
                with training_only(model, one.trained):
                    one.loss(samples[0], moment)[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        calls.append(len(seen))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 50
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-3, atol=1e-4 * g.abs().max().item())
    assert calls == [
        11,
        2,
    ]  # base 3, encoder pass 3, synthesizer pass 3 and its cycle 2; or the image and the edit, once each


def test_painting_some_images_estimates_the_same_means(head, sources):
    """Over the steps in which every image has had its turn, the image terms average to those of the whole batch; the other terms are the whole batch's."""
    model, job, passes, moment, samples = build(head, sources, "F2")
    n = len(samples[0].batch)
    few = copy.copy(job)
    few.config = dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, synthesized=n // 4))
    with torch.no_grad(), training_only(model, []):
        whole = dict(job.encoder_loss(samples[0], Moment(0))[1].present())
        turns = [dict(few.encoder_loss(few.prepare(samples[0].batch, k), Moment(k))[1].present()) for k in range(4)]
        cycled = few.synthesizer_loss(few.prepare(samples[0].batch, 0), Moment(0))[1]
    for name in ("photometric", "perceptual", "region"):
        assert torch.stack([t[name] for t in turns]).mean().item() == pytest.approx(whole[name].item(), rel=1e-4), name
        assert len({round(t[name].item(), 6) for t in turns}) > 1
    for name in ("landmark", "pose_landmark", "expression_3d", "shape_reg", "expression_reg"):
        assert all(t[name].item() == pytest.approx(whole[name].item(), rel=1e-4, abs=1e-9) for t in turns), name
    assert cycled.cycle.isfinite()


def test_the_emotion_head_may_begin_alone(head, sources):
    """Only the emotion head changes, it reads emotion better than before, and it comes out the same twice."""
    from fields.training.starts import warm_up_emotion
    from fields.training.losses import emotion

    results = []
    for _ in range(2):
        model, job, passes, moment, samples = build(
            head, sources, "F4", **{"train.emotion_warmup": 6, "train.learning_rate": 1e-3}
        )
        data, before = MixedData(sources, None, job.config, 8, 10), snapshot(model)
        crops = next(data.evaluation("affectnet", "train", 64))

        def loss():
            model.eval()
            with torch.no_grad():
                said = model.emotion(model.encode(crops.image))
            return emotion(said.logits, said.valence, said.arousal, crops).item()

        start = loss()
        assert "6 times" in warm_up_emotion(model, data, job.config)
        assert changed(model, before) == {"emotion"} and loss() < start
        results.append(model.emotion_head.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_lids_join_only_where_they_were_fitted(head, sources, tmp_path):
    """`loss.eyelids` adds the squared error of the lids of labelled frames, and is refused where no scan fit holds lids."""
    terms = {}
    for weight in (0.0, 30.0):
        model, job, _, moment, samples = build(head, sources, "F2", **{"loss.eyelids": weight})
        with torch.no_grad():
            terms[weight] = job.encoder_loss(samples[0], moment)[1].expression_3d.item()
    batch, params = samples[0].batch, job.encode(samples[0].batch.image)[0]
    squares = (params.eyelids - batch.eyelids).square().mean(1)[batch.has_expression]
    assert len(squares) and terms[30.0] - terms[0.0] == pytest.approx(30 * squares.mean().item(), rel=1e-3)
    assert batch.eyelids[batch.has_expression].std() > 0.05 and not batch.eyelids[~batch.has_expression].any()
    without = fake_sources(head)
    without["bp4d"].eyelids[:] = 0
    prepared(tmp_path, head, without)
    with pytest.raises(ValueError, match="loss.eyelids=5.0 needs lids fitted to the scans"):
        run_method(tmp_path, "F2", small_config(**{"loss.eyelids": 5.0}), head, without)
    run_method(tmp_path, "F1", small_config(**{"loss.eyelids": 5.0}), head, without)
