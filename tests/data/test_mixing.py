"Mixing and augmentation: exact shares, resumable sampling, landmarks that follow the image."

import numpy as np, pandas as pd, pytest, torch
from fractions import Fraction
from types import SimpleNamespace
from fields.config import Config, MixingConfig
from fields.data.augment import AugmentPlan, Augmentation, augment, crop_matrices, draw_plan, fixed_plan, move_points
from fields.data.mixing import Derived, MixedData, MixedSampler, Source, allocation, open_sources, shares, stage_of
from fields.types import DATASETS

ROWS = {
    "lrw": 400,
    "celeba": [np.arange(10 * i, 10 * i + 1 + i % 10) for i in range(50)],
    "ffhq": 300,
    "mead": 200,
    "affectnet": 500,
    "bp4d": 600,
}


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("stage", [1, 2])
def test_counts_over_ten_thousand_batches(batch, stage):
    part = shares(MixingConfig(), stage)
    exact = np.array([float(s) for s in part.values()]) * batch
    generator, total, worst = allocation(part, batch), np.zeros(6), 0
    for step in range(10_000):
        counts = np.array(list(next(generator).values()))
        assert counts.sum() == batch
        assert ((counts == np.floor(exact + 1e-9)) | (counts == np.ceil(exact - 1e-9))).all()
        total += counts
        worst = max(worst, np.abs(total - exact * (step + 1)).max())
    assert worst < 1


def test_shares_of_the_paper():
    first, second = shares(MixingConfig(), 1), shares(MixingConfig(), 2)
    assert first["bp4d"] == Fraction(3, 10) and second["bp4d"] == Fraction(1, 10)
    assert [second[n] for n in ("lrw", "celeba", "affectnet", "ffhq", "mead")] == [
        Fraction(n, 100) for n in (20, 26, 26, 10, 8)
    ]
    assert [first[n] / first["ffhq"] for n in ("lrw", "celeba", "affectnet", "mead")] == [
        2,
        Fraction(13, 5),
        Fraction(13, 5),
        Fraction(4, 5),
    ]
    assert sum(first.values()) == sum(second.values()) == 1


def test_other_shares():
    config = MixingConfig(celeba=0.0, mead=1 / 3)
    part = shares(config, 2)
    assert part["celeba"] == 0 and sum(part.values()) == 1
    generator = allocation(part, 7)
    assert all(sum(next(generator).values()) == 7 for _ in range(500))
    with pytest.raises(ValueError, match="cannot fill a batch"):
        shares(MixingConfig(lrw=-1), 1)
    assert shares(MixingConfig(lrw=0, celeba=0, affectnet=0, ffhq=0, mead=0, bp4d_first=1.0), 1)["bp4d"] == 1


def test_sampler_counts_do_not_depend_on_history():
    whole = MixedSampler(ROWS, MixingConfig(), 64, 3, second=40)
    for step in (0, 39, 40, 999, 70_000):
        stage = 1 if step < 40 else 2
        fresh = MixedSampler(ROWS, MixingConfig(), 64, 3, second=40)
        assert fresh.batch(step, stage) == whole.batch(step, stage)
        drawn = whole.batch(step, stage)
        assert {n: sum(d == n for d, _ in drawn) for n in DATASETS} == whole.counts(step, stage)
    reference = allocation(shares(MixingConfig(), 2), 64)
    expected = [next(reference) for _ in range(300)]
    assert [whole.counts(40 + s, 2) for s in range(300)] == expected


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_slice_one_batch(world):
    sampler = MixedSampler(ROWS, MixingConfig(), 64, 5)
    parts = [MixedSampler(ROWS, MixingConfig(), 64, 5).batch(12, 2, r, world) for r in range(world)]
    assert sum(parts, []) == sampler.batch(12, 2)
    with pytest.raises(ValueError, match="does not divide"):
        sampler.batch(0, 1, 0, 3)


def test_draws_are_uniform():
    sampler = MixedSampler(ROWS, MixingConfig(), 64, 1)
    drawn = [p for s in range(1500) for p in sampler.batch(s, 2)]
    celeba = np.array([r for n, r in drawn if n == "celeba"]) // 10
    assert abs(np.bincount(celeba, minlength=50) / len(celeba) - 0.02).max() < 0.004  # identities, whatever their size
    lrw = np.array([r for n, r in drawn if n == "lrw"])
    assert 0 <= lrw.min() and lrw.max() == 399 and abs(lrw.mean() - 199.5) < 5
    assert sampler.batch(1, 2) != sampler.batch(2, 2) != MixedSampler(ROWS, MixingConfig(), 64, 2).batch(2, 2)


def test_first_stage_is_six_ninetieths():
    assert [stage_of(s, 90, MixingConfig()) for s in (0, 5, 6)] == [1, 1, 2]
    assert stage_of(0, 8, MixingConfig()) == 1 and stage_of(1, 8, MixingConfig()) == 2


def store(name, count=20, size=48, seed=0):
    r = np.random.default_rng(seed)
    rows = pd.DataFrame(
        dict(
            id=[f"{name}/{i}" for i in range(count)],
            split=["train"] * (count - 5) + ["val"] * 5,
            subject=[f"s{i // 4}" for i in range(count)],
            found=True,
            emotion=np.arange(count) % 8.0,
            valence=0.3,
            arousal=np.where(np.arange(count) % 5, 0.2, np.nan),
        )
    )
    found = np.arange(count) % 7 != 3
    points = r.uniform(-0.45, 0.45, (count, 478, 2)).astype(np.float32)
    points[~found] = np.nan
    made = SimpleNamespace(
        images=r.integers(0, 255, (count, size, size, 4), np.uint8), points=points, rows=rows, found=found
    )
    derived = Derived(
        rows["id"].to_numpy(str),
        points[:, :17],
        found & (np.arange(count) % 2 == 0),
        points[:, :203],
        found,
        r.normal(size=(count, 300)).astype(np.float32),
        found,
        "a" * 64,
    )
    return made, derived


def sources(**changes):
    made = {}
    for i, n in enumerate(DATASETS):
        s, d = store(n, seed=i)
        labels = (
            SimpleNamespace(
                ids=["bp4d/1", "bp4d/2", "bp4d/4"],
                rejected=["", "residual above 2 mm", ""],
                expression=np.full((3, 50), 0.5),
                jaw=np.full((3, 3), 0.1),
                eyelids=np.full((3, 2), 0.3),
                head_sha256="a" * 64,
            )
            if n == "bp4d"
            else None
        )
        made[n] = Source(n, s, d, labels)
    return made


def data(batch=32, **kwargs):
    config = Config()
    config.network.image_size = 32
    return MixedData(sources(), np.arange(100, 205), config, batch, 90, **kwargs)


def test_batch_carries_labels_and_flags():
    d = data(256)
    batch = d.batch(2)
    assert (
        batch.image.shape == (256, 3, 32, 32)
        and batch.image.dtype == torch.float32
        and 0 <= batch.image.min() <= batch.image.max() <= 1
    )
    names = [i.split("/")[0] for i in batch.ids]
    assert [DATASETS[k] for k in batch.dataset.tolist()] == names
    for i, (name, row) in enumerate((n.split("/")[0], int(n.split("/")[1])) for n in batch.ids):
        assert row % 7 != 3  # frames without a face are never drawn
        assert batch.has_expression[i] == (name == "bp4d" and row in (1, 4))
        assert batch.has_emotion[i] == (name == "affectnet" and row % 8 < 7 and row % 5 != 0)
        assert batch.has_contour[i] == (row % 2 == 0)
    assert batch.has_expression.any() and batch.has_emotion.any()
    for values, label in ((batch.expression, 0.5), (batch.jaw, 0.1), (batch.eyelids, 0.3)):
        assert torch.equal(values, torch.where(batch.has_expression[:, None], label, 0.0).expand_as(values))
    for f in ("mediapipe", "contour", "points203", "image", "identity"):
        assert torch.isfinite(getattr(batch, f)).all()


def test_counts_name_every_frame():
    assert data().counts()["mead"] == {"train": (15, 13), "val": (5, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_processes_see_one_batch(world):
    whole = data(16).batch(30)
    parts = [data(16, rank=r, world=world).batch(30) for r in range(world)]
    for f in ("image", "hull", "mediapipe", "points203", "valence"):
        assert torch.equal(torch.cat([getattr(p, f) for p in parts]), getattr(whole, f))
    assert sum((p.ids for p in parts), []) == whole.ids


def test_evaluation_is_in_order_and_untouched():
    d = data()
    batches = list(d.evaluation("celeba", "val", 3))
    assert sum((b.ids for b in batches), []) == [f"celeba/{i}" for i in (15, 16, 18, 19)]
    assert torch.equal(
        torch.cat([b.image for b in d.evaluation("celeba", "val", 3)]), torch.cat([b.image for b in batches])
    )
    assert len(list(d.evaluation("celeba", "val", 8, limit=2))[0]) == 2


def test_messages(tmp_path):
    with pytest.raises(ValueError, match="`prepare` step for lrw"):
        open_sources(tmp_path)
    s, d = store("lrw")
    d.save(tmp_path / "derived.npz")
    assert Derived.load(tmp_path / "derived.npz").points203.shape == (20, 203, 2)
    d.ids = d.ids[::-1]
    with pytest.raises(ValueError, match="belong to other frames"):
        Source("lrw", s, d)
    (tmp_path / "derived.npz").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="does not hold derived targets"):
        Derived.load(tmp_path / "derived.npz")
    np.savez(tmp_path / "derived.npz", ids=np.zeros(3))
    with pytest.raises(ValueError, match="does not hold derived targets"):
        Derived.load(tmp_path / "derived.npz")
    with pytest.raises(ValueError, match="bp4d has a share"):
        MixedSampler({n: r for n, r in ROWS.items() if n != "bp4d"}, MixingConfig(), 8, 0)


def pattern(count, side, points):
    "Images whose blobs sit at the points, so that the picture itself says where they went."
    y, x = np.mgrid[:side, :side]
    centre = (points + 1) * side / 2 - 0.5
    blobs = np.exp(-((x - centre[..., 0, None, None]) ** 2 + (y - centre[..., 1, None, None]) ** 2) / (2 * 2.5**2))
    image = np.zeros((count, side, side, 4), np.uint8)
    image[..., :3] = (blobs.max(1) * 250).astype(np.uint8)[..., None]
    return torch.from_numpy(image)


def test_landmarks_follow_the_image_and_come_back():
    r = np.random.default_rng(0)
    points = r.uniform(-0.3, 0.3, (16, 1, 2)).astype(np.float32)
    crops, size = pattern(16, 160, points), 112
    plan = draw_plan(
        np.arange(16),
        Augmentation(brightness_contrast=0, gamma=0, jitter=0, channel_shift=0, blur=0, noise=0, affine=1),
    )
    out = augment(crops, torch.from_numpy(points), plan, size)
    back = move_points(torch.linalg.inv(out.matrix), out.points)
    assert (back - torch.from_numpy(points)).abs().max() * 80 < 0.05  # pixels of the cached crop
    weights = out.image[:, 0] * (out.image[:, 0] > 0.2)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    seen = torch.stack([(weights * c).sum((1, 2)) / weights.sum((1, 2)) for c in (x, y)], 1)
    there = (out.points[:, 0] + 1) * size / 2 - 0.5
    assert (seen - there).norm(dim=1).max() < 0.15  # the picture agrees with the map, pixels
    assert plan.angle.abs().max() > 0.05 and plan.shift.abs().max() > 0.01


def test_hull_moves_with_the_image():
    side = 160
    y, x = np.mgrid[:side, :side] * 2 / side - 1 + 1 / side
    inside = (x / 0.3) ** 2 + (y / 0.4) ** 2 < 1
    image = np.repeat((inside * 255).astype(np.uint8)[None, ..., None], 4, -1).repeat(8, 0)
    plan = draw_plan(
        np.arange(8), Augmentation(brightness_contrast=0, gamma=0, jitter=0, channel_shift=0, blur=0, noise=0)
    )
    out = augment(torch.from_numpy(image), torch.zeros(8, 1, 2), plan, 112)
    assert torch.equal(out.hull[:, 0] > 0.5, out.image[:, 0] > 0.5)


def test_sample_does_not_depend_on_its_batch():
    crops = torch.randint(0, 255, (6, 64, 64, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    points, seeds = torch.zeros(6, 5, 2), np.arange(50, 56)
    whole = augment(crops, points, draw_plan(seeds), 48)
    for i in range(6):
        alone = augment(crops[i : i + 1], points[i : i + 1], draw_plan(seeds[i : i + 1]), 48)
        assert torch.allclose(alone.image[0], whole.image[i], atol=2e-6) and torch.equal(
            alone.points[0], whole.points[i]
        )


def test_scales_and_border():
    plan = draw_plan(np.arange(4000))
    quarter = torch.quantile(plan.scale, torch.tensor([0.01, 0.5, 0.99]))
    assert 1.1 < quarter[0] < 1.2 and abs(quarter[1] - 1.5) < 0.02 and 1.8 < quarter[2] < 1.95
    crops = torch.full((1, 64, 64, 4), 200, dtype=torch.uint8)
    wide = fixed_plan(1, 3.0)
    wide.noise += 0.1
    out = augment(crops, torch.zeros(1, 1, 2), wide, 60)
    assert (out.image[0, :, :8] == 0).all() and (out.image[0, :, 30] > 0).any() and (out.hull[0, 0, :8] == 0).all()


def test_plan_matrix_against_kornia():
    import kornia

    plan = fixed_plan(3)
    plan.angle, plan.scale = torch.tensor([0.1, -0.2, 0.0]), torch.tensor([1.3, 1.7, 1.0])
    _, forth = crop_matrices(plan)
    reference = kornia.geometry.transform.get_rotation_matrix2d(
        torch.zeros(3, 2), torch.rad2deg(-plan.angle), (2 / plan.scale)[:, None].expand(3, 2)
    )
    assert torch.allclose(forth[:, :2, :2], reference[:, :, :2], atol=1e-5)


def test_everything_is_neutral_in_evaluation():
    plan = fixed_plan(2)
    assert isinstance(plan, AugmentPlan) and (plan.scale == 1.4).all() and not plan.angle.any() and not plan.noise.any()
