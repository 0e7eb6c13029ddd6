"A small run folder with invented faces, for tests of the evaluation: the formats are the real ones, the numbers are made up."

import csv, json
from pathlib import Path
import numpy as np, torch
from fields.config import load_profile, to_dict
from fields.head.flame import Head
from fields.render.shade import geometry_image
from fields.scans.labels import CroppedScan, ExpressionLabels, place
from fields.stage import RunDir
from fields.types import EMOTIONS, HeadParams, Prediction, DATASETS

# Strength of the expression and noise of each invented method: F1 exaggerates, F4 is best.
METHODS = {
    "F0": (0.5, 0.9),
    "F1": (2.2, 0.6),
    "F2": (0.9, 0.5),
    "F3": (1.4, 0.4),
    "F4": (1.0, 0.3),
    "lambda0.5": (0.9, 0.35),
    "lambda1": (0.95, 0.33),
    "lambda10": (1.1, 0.3),
}
SUBJECTS = {
    "train": ["F001", "F002", "F003", "M001", "M002", "M006"],
    "val": ["F014", "M003"],
    "test": ["F010", "F011", "F021", "M004", "M005", "M017"],
}


def smoke_config(**changes):
    "The smoke profile with a probe that is done in a second."
    from fields.config import override

    return override(
        load_profile("smoke"),
        {
            "evaluation.probe_width": 32,
            "evaluation.probe_epochs": 6,
            "evaluation.bootstrap": 100,
            "evaluation.figure_points": 100,
            "train.methods": "F1,F2,F3,F4",
        }
        | changes,
    )


def emotional(rng, n, classes=None):
    "Classes, valence, arousal and expressions of n faces."
    classes = rng.integers(0, 7, n) if classes is None else classes
    centre = np.array([[0, 0], [0.8, 0.2], [-0.6, -0.4], [0.2, 0.8], [-0.4, 0.8], [-0.7, 0.3], [-0.5, 0.6]])
    strength = rng.uniform(0.5, 1.2, n)
    affect = centre[classes] * strength[:, None] + rng.normal(0, 0.1, (n, 2))
    basis = np.random.default_rng(99)
    expression = (
        affect @ basis.normal(0, 1.2, (2, 50))
        + np.eye(7)[classes] @ basis.normal(0, 0.8, (7, 50))
        + rng.normal(0, 0.4, (n, 50))
    )
    jaw = np.column_stack([np.clip(0.15 * affect[:, 1] + rng.normal(0, 0.05, n), -0.05, 0.4), np.zeros(n), np.zeros(n)])
    return classes, affect.clip(-1, 1), expression, jaw


def params_of(rng, shape, expression, jaw, strength=1.0, noise=0.0):
    "Head parameters near the given ones."
    n = len(shape)
    p = HeadParams.neutral(n, scale=7.0)
    real = np.arange(300) < 40
    p.shape[:] = torch.as_tensor(shape + noise * 0.5 * rng.normal(size=shape.shape) * real)
    p.expression[:] = torch.as_tensor(strength * expression + noise * rng.normal(size=expression.shape))
    p.jaw[:] = torch.as_tensor(jaw + noise * 0.03 * rng.normal(size=jaw.shape) * [1, 0, 0])
    p.eyelids[:] = torch.as_tensor(rng.uniform(0, 0.2, (n, 2)))
    p.rotation[:] = torch.as_tensor(rng.normal(0, 0.15, (n, 3)))
    return p


def write_crops(folder, ids, splits, subjects, classes, affect, images):
    "Write rows.csv, images.npy and points.npy as the step `prepare` does."
    folder.mkdir(parents=True)
    with open(folder / "rows.csv", "w", newline="") as file:
        w = csv.writer(file)
        w.writerow("index,id,split,subject,found,emotion,valence,arousal,box_cx,box_cy,box_side".split(","))
        for i, name in enumerate(ids):
            label = ["", "", ""] if classes is None else [classes[i], affect[i, 0], affect[i, 1]]
            w.writerow([i, name, splits[i], subjects[i], True, *label, 64, 64, 64])
    np.save(folder / "images.npy", images)
    angle = np.linspace(0, 2 * np.pi, 478)
    np.save(
        folder / "points.npy",
        np.broadcast_to(np.stack([0.4 * np.cos(angle), 0.5 * np.sin(angle)], 1), (len(ids), 478, 2)).astype(np.float32),
    )
    (folder / "report.json").write_text(json.dumps({"items": len(ids), "images": len(ids), "found": len(ids)}))


def render(head, params, size=48):
    "Grey pictures of faces with a mask: (N,S,S,4) bytes."
    image, mask = geometry_image(
        head(params).vertices, head.mask_faces("face"), params.camera * torch.tensor([0.7, 1, 1]), size
    )
    return (torch.cat([image, mask], 1).permute(0, 2, 3, 1) * 255).byte().numpy()


def fake_run(path, seed=0, heldout=12, train=140, frames=2, methods=tuple(METHODS), oracle=True):
    "Write a run folder with labels, crops, scans, logs and predictions; return it as a RunDir with its head."
    run, rng, head = RunDir(path), np.random.default_rng(seed), Head.load("open")
    for name in ("predictions", "scans/cropped", "metrics", "logs", "timing"):
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_dict(smoke_config())))
    (run / "timing" / "emotion.json").write_text(json.dumps({"seconds": 1.5}))
    real = np.arange(300) < 40

    def save(name, method, params, ids):
        Prediction(params, ids, head.sha256, method).save(run / "predictions" / f"{method}_{name}.npz")

    n = 7 * heldout
    classes = np.concatenate(
        [np.tile(np.arange(7), heldout), rng.choice(7, train, p=[0.25, 0.3, 0.1, 0.1, 0.08, 0.07, 0.1])]
    )
    classes[n : n + 70] = np.tile(np.arange(7), 10)
    classes, affect, expression, jaw = emotional(rng, n + train, classes)
    shape = rng.normal(size=(n + train, 300)) * real
    ids, splits = [f"affectnet/{i}" for i in range(n + train)], ["val"] * n + ["train"] * train
    truth = params_of(rng, shape, expression, jaw)
    write_crops(run / "crops" / "affectnet", ids, splits, [""] * len(ids), classes, affect, render(head, truth))
    for k, method in enumerate(methods):
        p = params_of(np.random.default_rng([seed, k]), shape, expression, jaw, *METHODS[method])
        save("affectnet_val", method, p[:n], ids[:n])
        save("affectnet_train", method, p[n:], ids[n:])
    if oracle:
        save("affectnet_val", "oracle", truth[:n], ids[:n])
        save("affectnet_train", "oracle", truth[n:], ids[n:])

    people = [(s, name) for s, names in SUBJECTS.items() for name in names]
    subject = [name for _, name in people for _ in range(frames)]
    splits = [s for s, _ in people for _ in range(frames)]
    ids = [f"bp4d/{name}/T1/{i}" for i, name in enumerate(subject)]
    _, _, expression, jaw = emotional(rng, len(ids))
    shape = np.repeat(rng.normal(size=(len(people), 300)) * real, frames, 0)
    truth = params_of(rng, shape, expression, jaw)
    write_crops(run / "crops" / "bp4d", ids, splits, subject, None, None, render(head, truth))
    fitted = expression + 0.1 * rng.normal(size=expression.shape)
    rejected = [""] * len(ids)
    rejected[0] = "the residual is too large"
    pose = np.concatenate([rng.normal(0, 0.1, (len(ids), 3)), rng.normal([0.02, -0.03, 0.08], 0.02, (len(ids), 3))], 1)
    n = len(ids)
    ExpressionLabels(
        np.array(ids),
        np.array(subject),
        *(a.astype(np.float32) for a in (shape, fitted, jaw, pose[:, :3], pose[:, 3:])),
        np.full(n, 4e-4),
        np.full(n, 1e-3),
        np.ones(n, bool),
        np.array(rejected),
        head.sha256,
    ).save(run / "scans" / "labels.npz")
    for which in ("test", "val"):
        at = [i for i, s in enumerate(splits) if s == which]
        some = [ids[i] for i in at]
        for k, method in enumerate(methods):
            save(
                f"bp4d_{which}",
                method,
                params_of(np.random.default_rng([seed, k, 1]), shape[at], expression[at], jaw[at], *METHODS[method]),
                some,
            )
        if oracle:
            save(f"bp4d_{which}", "oracle", truth[at], some)
        if which == "test":
            write_scans(run, head, rng, shape[at], fitted[at], jaw[at], pose[at], some)
    for name in DATASETS:
        if not (run / "crops" / name).exists():
            write_crops(
                run / "crops" / name,
                [f"{name}/{i}" for i in range(4)],
                ["train"] * 4,
                [""] * 4,
                None,
                None,
                render(head, truth[:4]),
            )
    for method in ("F0", *methods[1:5]):
        (run / "checkpoints" / method).mkdir(parents=True, exist_ok=True)
        with open(run / "checkpoints" / method / "log.csv", "w", newline="") as file:
            w = csv.writer(file)
            w.writerow(["step", "encoder.photometric", "encoder.landmark", "synthesizer.cycle", "encoder.objective"])
            for step in range(30):
                w.writerow(
                    [
                        step,
                        1 / (1 + step / 9) + 0.05 * rng.random(),
                        0.3 / (1 + step / 5),
                        0.2 / (1 + step / 20),
                        9 / (1 + step / 9),
                    ]
                )
    return run, head


def write_scans(run, head, rng, shape, expression, jaw, pose, ids):
    "Write cropped scans of the fitted faces: points of the surface with noise, where the scanner saw them."
    p = params_of(rng, shape, expression, jaw)
    p.eyelids[:] = 0
    p.rotation[:] = torch.as_tensor(pose[:, :3])
    output = head(p)
    faces, marks = head.mask_faces("face").numpy(), head.landmarks(output, "bp4d83").numpy()
    for i, name in enumerate(ids):
        v = output.vertices[i].numpy()
        f = faces[rng.integers(0, len(faces), 3000)]
        points = (
            (v[f] * rng.dirichlet([1, 1, 1], 3000)[..., None]).sum(1) + rng.normal(0, 3e-4, (3000, 3)) + pose[i, 3:]
        )
        path = place(run / "scans" / "cropped" / "bp4d", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        CroppedScan(points.astype(np.float32), marks[i] + pose[i, 3:], "bp4d83", 5000).save(path)
