"Invented training data in memory: six small datasets whose frames, landmarks and labels fit together."

import numpy as np, pandas as pd, torch
from types import SimpleNamespace
from fields.config import load_profile
from fields.data.mesh import MEDIAPIPE_105
from fields.data.mixing import Derived, Source
from fields.head.flame import Head
from fields.render.shade import geometry_image
from fields.training.pretrain import projected
from fields.types import DATASETS, HeadParams


def fake_sources(head, count=12, size=92, seed=0):
    "Six datasets of rendered grey heads; the last third is validation; BP4D has scan labels."
    sources = {}
    for number, name in enumerate(DATASETS):
        g = torch.Generator().manual_seed(seed * 10 + number)
        r = lambda *s: torch.randn(*s, generator=g)
        p = HeadParams.neutral(count, scale=5.0)
        p.shape[:, :20], p.expression[:, :10], p.rotation = r(count, 20), r(count, 10), 0.2 * r(count, 3)
        p.jaw[:, 0], p.eyelids[:] = 0.2 * torch.rand(count, generator=g), 0.5 * torch.rand(count, 2, generator=g)
        with torch.no_grad():
            output = head(p)
            picture, mask = geometry_image(output.vertices, head.mask_faces("face"), p.camera, size)
            point = lambda which: projected(head, p, which, output).numpy().astype(np.float32)
            points = np.repeat(point("static51")[:, :1], 478, 1)
            points[:, list(MEDIAPIPE_105)] = point("mediapipe105")
        tint = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=g)
        images = (
            (torch.cat([picture * tint + (1 - mask) * 0.4 * tint.flip(1), mask], 1).permute(0, 2, 3, 1) * 255)
            .byte()
            .numpy()
        )
        rows = pd.DataFrame(
            dict(
                id=[f"{name}/{i}" for i in range(count)],
                split=["train"] * (count - count // 3) + ["val"] * (count // 3),
                subject=[f"s{i // 2}" for i in range(count)],
                found=True,
                emotion=np.arange(count) % 7.0,
                valence=0.4,
                arousal=-0.2,
            )
        )
        store = SimpleNamespace(images=images, points=points, rows=rows, found=np.ones(count, bool))
        derived = Derived(
            rows["id"].to_numpy(str),
            point("contour17"),
            np.arange(count) % 5 > 0,
            point("points203"),
            np.arange(count) % 4 > 0,
            p.shape.numpy(),
            np.ones(count, bool),
            head.sha256,
        )
        labels = SimpleNamespace(
            ids=list(rows["id"]),
            rejected=[""] * count,
            expression=p.expression.numpy(),
            jaw=p.jaw.numpy(),
            eyelids=p.eyelids.numpy(),
            head_sha256=head.sha256,
        )
        sources[name] = Source(name, store, derived, labels if name == "bp4d" else None)
    return sources


def small_config(**changes):
    "The smoke profile with batches of 8 and a few iterations."
    return load_profile(
        "smoke",
        {
            "network.image_size": 32,
            "threads": 1,
            "device": "cpu",
            "train.batch": 8,
            "train.steps": 6,
            "train.teaser_steps": 2,
            "train.checkpoint_every": 3,
            "train.precision": "32",
            "pretrain.batch": 8,
            "pretrain.steps": 4,
            "pretrain.validate_every": 2,
            **changes,
        },
    )


def write_standins(folder, seed=0):
    "Frozen networks with random weights, as the stand-ins step leaves them."
    from fields.models.fields import save_tensors
    from fields.models.perceptual import SmallEmotion, SmallPerceptual

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_tensors(folder / "perceptual.safetensors", SmallPerceptual(identities=5).state_dict(), {})
        save_tensors(folder / "emotion.safetensors", SmallEmotion().state_dict(), {})


def prepared(tmp_path, head, sources, **changes):
    "A run with stand-ins, F0 and the TEASER initialisation."
    from fields.training.methods import INITIAL_NAME, run_method

    config = small_config(**changes)
    write_standins(tmp_path / "standins")
    run_method(tmp_path, "F0", config, head, sources)
    run_method(tmp_path, INITIAL_NAME, config, head, sources)
    return config
