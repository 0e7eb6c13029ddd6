"Networks against independent implementations, exact lists of names and shapes, files that must be refused, and freezing."

import json, os, random, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from fields.config import NetworkConfig
from fields.models import checkpoints, fields as model_file
from fields.models.backbones import MobileNetV3, SameConv2d, SmallTrunk
from fields.models.encoders import ExpressionEncoder, GeometryEncoders, limit
from fields.models.fields import FieldsModel, check_tensors, read_tensors, save_tensors
from fields.models.identity import ARCFACE_POINTS, ArcFace, Mica, align, alignment
from fields.models.masking import SparsePoints, background, dilate, paste_pixels, region_weights, sample_points
from fields.models.perceptual import EmotionResNet50, SmallPerceptual, Vgg16
from fields.models.synthesizer import SmirkSynthesizer, Synthesizer
from fields.models.tokens import AdaIN, TokenEncoder

PAPER, SMALL = NetworkConfig(size="paper", image_size=224, output_range="smirk"), NetworkConfig()
FLAME = SimpleNamespace(sha256="f" * 64, name="flame2020", version="FLAME 2020")
count = lambda module: sum(p.numel() for p in module.parameters())

# ---- lists of names and shapes, written down from the facts and not from the networks --------------------------------


def norm(name, channels, extra=True):
    shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


# every block of a stage: channels in, in the middle, out; "ds" has no middle, "cn" is one convolution
TIMM = {
    "small": [
        [(16, None, 16)],
        [(16, 72, 24), (24, 88, 24)],
        [(24, 96, 40), (40, 240, 40), (40, 240, 40)],
        [(40, 120, 48), (48, 144, 48)],
        [(48, 288, 96), (96, 576, 96), (96, 576, 96)],
        [(96, 576)],
    ],
    "large": [
        [(16, None, 16)],
        [(16, 64, 24), (24, 72, 24)],
        [(24, 72, 40), (40, 120, 40), (40, 120, 40)],
        [(40, 240, 80), (80, 200, 80), (80, 184, 80), (80, 184, 80)],
        [(80, 480, 112), (112, 672, 112)],
        [(112, 672, 160), (160, 960, 160), (160, 960, 160)],
        [(160, 960)],
    ],
}
STRIDES = {"small": [2, 2, 2, 1, 2, 1], "large": [1, 2, 2, 2, 1, 2, 1]}


def timm_shapes(size, prefix=""):
    shapes = {"conv_stem.weight": (16, 3, 3, 3)} | norm("bn1", 16)
    for i, stage in enumerate(TIMM[size]):
        for j, widths in enumerate(stage):
            b = f"blocks.{i}.{j}"
            if len(widths) == 2:
                shapes |= {f"{b}.conv.weight": (widths[1], widths[0], 1, 1)} | norm(f"{b}.bn1", widths[1])
            elif widths[1] is None:
                shapes |= {
                    f"{b}.conv_dw.weight": (widths[0], 1, 3, 3),
                    f"{b}.conv_pw.weight": (widths[2], widths[0], 1, 1),
                }
                shapes |= norm(f"{b}.bn1", widths[0]) | norm(f"{b}.bn2", widths[2])
            else:
                a, m, c = widths
                shapes |= {
                    f"{b}.conv_pw.weight": (m, a, 1, 1),
                    f"{b}.conv_dw.weight": (m, 1, 3, 3),
                    f"{b}.conv_pwl.weight": (c, m, 1, 1),
                }
                shapes |= norm(f"{b}.bn1", m) | norm(f"{b}.bn2", m) | norm(f"{b}.bn3", c)
    return {prefix + n: s for n, s in shapes.items()}


def encoder_shapes(prefix, tokens):
    shapes = {}
    for part, size, layers, outputs in (
        ("pose", "small", "pose_cam_layers", 6),
        ("shape", "large", "shape_layers", 300),
        ("expression", "large", "expression_layers", 55),
    ):
        p = f"{prefix}.{part}_encoder"
        shapes |= timm_shapes(size, f"{p}.encoder.") | linear(
            f"{p}.{layers}.0", outputs, 576 if size == "small" else 960
        )
    if tokens:
        shapes |= timm_shapes("small", f"{prefix}.token_encoder.encoder.")
        for i, width in enumerate((576, 192, 384, 1024)):
            shapes |= linear(f"{prefix}.token_encoder.token_layers.{i}.0", 256, width)
    return shapes


def generator_shapes(prefix, tokens):
    shapes, widths = {}, {1: 32, 2: 64, 3: 128, 4: 256}
    blocks = [(f"encoder{i}", f"enc{i}", {1: 6}.get(i, w // 2), w) for i, w in widths.items()]
    blocks += [(f"decoder{i}", f"dec{i}", 2 * w, w) for i, w in widths.items()] + [
        ("bottleneck", "bottleneck", 256, 512)
    ]
    for block, short, inputs, outputs in blocks:
        for i, c in ((1, inputs), (2, outputs)):
            short_conv, short_norm = (f"conv{i}", f"norm{i}") if tokens else (f"{short}conv{i}", f"{short}norm{i}")
            shapes |= {f"{block}.{short_conv}.weight": (outputs, c, 3, 3)} | norm(f"{block}.{short_norm}", outputs)
            if tokens:
                shapes |= linear(f"{block}.adain{i}.mlp_shared.0", 128, 256)
                shapes |= linear(f"{block}.adain{i}.mlp_gamma", outputs, 128) | linear(
                    f"{block}.adain{i}.mlp_beta", outputs, 128
                )
    for i in range(5):
        r = f"resnet_blocks.{i}.conv_block"
        shapes |= (
            {f"{r}.1.weight": (512, 512, 3, 3), f"{r}.5.weight": (512, 512, 3, 3)}
            | norm(f"{r}.2", 512)
            | norm(f"{r}.6", 512)
        )
    for i, w in widths.items():
        shapes |= {f"upconv{i}.weight": (2 * w, w, 2, 2), f"upconv{i}.bias": (w,)}
    shapes |= {"conv.weight": (3, 32, 1, 1), "conv.bias": (3,)}
    if tokens:
        shapes |= linear("token_decoder.decoder_1.0", 256 * 14 * 14, 1024)
        for d, conv, inputs, outputs in ((1, 3, 256, 256), (2, 1, 256, 128), (3, 1, 128, 64), (4, 1, 64, 32)):
            c = f"token_decoder.decoder_{d}.{conv}"
            shapes |= {f"{c}.weight": (outputs, inputs, 3, 3), f"{c}.bias": (outputs,)} | norm(
                f"token_decoder.decoder_{d}.{conv + 1}", outputs
            )
        shapes |= {"token_decoder.decoder_4.4.weight": (32, 32, 3, 3), "token_decoder.decoder_4.4.bias": (32,)}
        for i, w in widths.items():
            shapes |= {f"token_zero_conv_{i}.weight": (w, w, 1, 1), f"token_zero_conv_{i}.bias": (w,)}
    return {f"{prefix}.{n}": s for n, s in shapes.items()}


def official_shapes(kind):
    return encoder_shapes(f"{kind}_encoder", kind == "teaser") | generator_shapes(f"{kind}_generator", kind == "teaser")


def mica_shapes():
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,)} | norm("bn1", 64)
    inputs = 64
    for i, (blocks, width) in enumerate(zip((3, 13, 30, 3), (64, 128, 256, 512)), 1):
        for j in range(blocks):
            b = f"layer{i}.{j}"
            shapes |= norm(f"{b}.bn1", inputs) | norm(f"{b}.bn2", width) | norm(f"{b}.bn3", width)
            shapes |= {
                f"{b}.conv1.weight": (width, inputs, 3, 3),
                f"{b}.prelu.weight": (width,),
                f"{b}.conv2.weight": (width, width, 3, 3),
            }
            if j == 0:
                shapes |= {f"{b}.downsample.0.weight": (width, inputs, 1, 1)} | norm(f"{b}.downsample.1", width)
            inputs = width
    shapes |= norm("bn2", 512) | linear("fc", 512, 25088) | norm("features", 512)
    mapping = {}
    for i in range(4):
        mapping |= linear(f"regressor.network.{i}", 300, 512 if i == 0 else 300)
    return shapes, mapping | linear("regressor.output", 300, 300)


def resnet50_shapes():
    shapes, inputs = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64), 64
    for i, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for j in range(blocks):
            b = f"layer{i}.{j}"
            shapes |= {
                f"{b}.conv1.weight": (width, inputs, 1, 1),
                f"{b}.conv2.weight": (width, width, 3, 3),
                f"{b}.conv3.weight": (4 * width, width, 1, 1),
            }
            shapes |= norm(f"{b}.bn1", width) | norm(f"{b}.bn2", width) | norm(f"{b}.bn3", 4 * width)
            if j == 0:
                shapes |= {f"{b}.downsample.0.weight": (4 * width, inputs, 1, 1)} | norm(f"{b}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes


def shapes_of(module):
    return {n: tuple(v.shape) for n, v in module.state_dict().items()}


def fabricate(shapes, fill=0.01):
    "Tensors of these names and shapes that all share one number, so that files stay small."
    one, steps = torch.full((1,), fill), torch.tensor(3)
    return {n: steps if n.endswith("num_batches_tracked") else one.expand(s) for n, s in shapes.items()}


def meta(build):
    with torch.device("meta"):
        return build()


# ---- counts, names, shapes ---------------------------------------------------------------------------------------------


def test_names_and_shapes_of_backbones():
    for size, tensors, parameters in (("small", 204, 428888), ("large", 276, 1413208)):
        net, expected = MobileNetV3(size), timm_shapes(size)
        assert shapes_of(net) == expected and len(expected) == tensors and count(net) == parameters
    assert all(
        m.eps == 1e-3 and m.momentum == 0.1
        for m in MobileNetV3("small").modules()
        if isinstance(m, torch.nn.BatchNorm2d)
    )


def test_parameter_counts_of_the_paper():
    model = meta(lambda: FieldsModel(PAPER, FLAME))
    smirk = meta(lambda: SmirkSynthesizer(PAPER))
    assert {n: count(p) for n, p in model.parts.items()} == {
        "pose": 432350,
        "shape": 1701508,
        "expression": 1466063,
        "tokens": 986968,
        "synthesizer": 85224355,
        "emotion": 355 * 256 + 2 * 256 * 256 + 9 * 256 + 3 * 256 * 3 + 9,
    }
    assert count(smirk) == 31367171 and len(smirk.state_dict()) == 178 and len(model.synthesizer.state_dict()) == 326
    assert count(model.encoders) + count(model.token_encoder) == 4586889
    assert len(model.encoders.state_dict()) == 762 and len(model.token_encoder.state_dict()) == 212


@pytest.mark.parametrize("kind,encoder,generator", [("smirk", 762, 178), ("teaser", 974, 326)])
def test_names_and_shapes_of_published_models(kind, encoder, generator):
    model, expected = meta(lambda: FieldsModel(PAPER, FLAME, kind, emotion=False)), official_shapes(kind)
    assert {checkpoints._official(n, kind): s for n, s in shapes_of(model).items()} == expected
    assert (
        sum(n.startswith(f"{kind}_encoder.") for n in expected) == encoder
        and sum(n.startswith(f"{kind}_generator.") for n in expected) == generator
    )


def test_names_and_shapes_of_mica_vgg_and_resnet():
    arcface, mapping = mica_shapes()
    assert shapes_of(meta(Mica)) == {f"arcface.{n}": s for n, s in arcface.items()} | mapping
    assert shapes_of(meta(EmotionResNet50)) == resnet50_shapes()
    vgg = checkpoints.vgg16_shapes()
    assert len(vgg) == 32 and sum(int(np.prod(s)) for s in vgg.values()) == 138357544
    assert shapes_of(Vgg16()) == {
        n: s for n, s in vgg.items() if n.startswith("features.") and int(n.split(".")[1]) < 22
    }


def test_small_model_fits_in_15_megabytes(tmp_path):
    model = FieldsModel(SMALL, FLAME, seed=0)
    assert len(model.parts) == 6
    assert model.save(tmp_path / "half.safetensors", half=True).stat().st_size < 15e6


# ---- arithmetic against independent implementations ------------------------------------------------------------------


@pytest.mark.parametrize("height,width,kernel,stride", [(7, 8, 3, 2), (8, 8, 3, 2), (9, 5, 3, 1), (10, 11, 5, 3)])
def test_same_convolution_by_hand(height, width, kernel, stride):
    conv = SameConv2d(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, height, width, dtype=torch.float64)
    a, w = x[0, 0].numpy(), conv.weight.detach()[0, 0].numpy()
    out = np.zeros((-(-height // stride), -(-width // stride)))
    before = [max((n - 1) * stride + kernel - size, 0) // 2 for n, size in zip(out.shape, a.shape)]
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(kernel):
                for l in range(kernel):
                    r, c = i * stride + k - before[0], j * stride + l - before[1]
                    if 0 <= r < height and 0 <= c < width:
                        out[i, j] += a[r, c] * w[k, l]
    assert np.allclose(conv(x).detach()[0, 0].numpy(), out, atol=1e-12)


def same(x, w, stride, groups=1):
    k = w.shape[-1]
    py, px = (max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[2:])
    return F.conv2d(F.pad(x, (px // 2, px - px // 2, py // 2, py - py // 2)), w, stride=stride, groups=groups)


def reference_backbone(state, size, x):
    "The network again, from its tensors and the table of channels."
    bn = lambda x, n: F.batch_norm(
        x,
        state[f"{n}.running_mean"],
        state[f"{n}.running_var"],
        state[f"{n}.weight"],
        state[f"{n}.bias"],
        False,
        0.1,
        1e-3,
    )
    x, maps = F.relu(bn(same(x, state["conv_stem.weight"], 2), "bn1")), []
    for i, stage in enumerate(TIMM[size]):
        if STRIDES[size][i] == 2:
            maps.append(x)
        for j, widths in enumerate(stage):
            b, stride, shortcut = f"blocks.{i}.{j}", STRIDES[size][i] if j == 0 else 1, x
            if len(widths) == 2:
                x = F.relu(bn(F.conv2d(x, state[f"{b}.conv.weight"]), f"{b}.bn1"))
            elif widths[1] is None:
                x = F.relu(bn(same(x, state[f"{b}.conv_dw.weight"], stride, widths[0]), f"{b}.bn1"))
                x = bn(F.conv2d(x, state[f"{b}.conv_pw.weight"]), f"{b}.bn2")
            else:
                x = F.relu(bn(F.conv2d(x, state[f"{b}.conv_pw.weight"]), f"{b}.bn1"))
                x = F.relu(bn(same(x, state[f"{b}.conv_dw.weight"], stride, widths[1]), f"{b}.bn2"))
                x = bn(F.conv2d(x, state[f"{b}.conv_pwl.weight"]), f"{b}.bn3")
            if len(widths) == 3 and stride == 1 and widths[0] == widths[2]:
                x = x + shortcut
    return maps + [x]


def randomise(module, seed=0):
    "Give BatchNorm statistics and weights that are not trivial."
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith("running_mean") or (value.dim() == 1 and value.is_floating_point()):
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("size", ["small", "large"])
def test_backbone_against_a_second_implementation(size):
    net, x = randomise(MobileNetV3(size)).double(), torch.rand(2, 3, 70, 64, dtype=torch.float64)
    ours, again = net(x), reference_backbone(net.state_dict(), size, x)
    assert len(ours) == 5 and all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(ours, again))
    assert torch.allclose(net.pooled(x), again[-1].flatten(2).mean(2))


def reference_synthesizer(state, geometry, masked, tokens=None):
    "The published U-Net again, from its tensors alone."
    bn = lambda x, n: F.batch_norm(
        x,
        state[f"{n}.running_mean"],
        state[f"{n}.running_var"],
        state[f"{n}.weight"],
        state[f"{n}.bias"],
        False,
        0.1,
        1e-5,
    )
    lin = lambda x, n: x @ state[f"{n}.weight"].t() + state[f"{n}.bias"]

    def block(x, name, short, token):
        for i in (1, 2):
            c, n = (f"{short}conv{i}", f"{short}norm{i}") if tokens is None else (f"conv{i}", f"norm{i}")
            x = bn(F.conv2d(x, state[f"{name}.{c}.weight"], padding=1), f"{name}.{n}")
            if tokens is not None:
                h = F.relu(lin(token, f"{name}.adain{i}.mlp_shared.0"))
                mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
                x = (x - mean) / (var + 1e-5).sqrt() * (1 + lin(h, f"{name}.adain{i}.mlp_gamma"))[
                    ..., None, None
                ] + lin(h, f"{name}.adain{i}.mlp_beta")[..., None, None]
            x = F.relu(x)
        return x

    token = {1: 3, 2: 2, 3: 1, 4: 0}
    t = lambda i: None if tokens is None else tokens[token[i]]
    x, skips = torch.cat([geometry, masked], 1), {}
    for i in (1, 2, 3, 4):
        skips[i] = block(x if i == 1 else F.max_pool2d(skips[i - 1], 2), f"encoder{i}", f"enc{i}", t(i))
    x = block(F.max_pool2d(skips[4], 2), "bottleneck", "bottleneck", t(4))
    for i in range(5):
        n = f"resnet_blocks.{i}.conv_block"
        y = F.relu(bn(F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), state[f"{n}.1.weight"]), f"{n}.2"))
        x = x + bn(F.conv2d(F.pad(y, (1, 1, 1, 1), "reflect"), state[f"{n}.5.weight"]), f"{n}.6")
    extra = None
    for i in (4, 3, 2, 1):
        up = F.conv_transpose2d(x, state[f"upconv{i}.weight"], state[f"upconv{i}.bias"], stride=2)
        x = block(torch.cat([up, skips[i]], 1), f"decoder{i}", f"dec{i}", t(i))
        if tokens is not None:
            d = 5 - i
            if d == 1:
                extra = lin(
                    torch.cat([tokens[3], tokens[2], tokens[1], tokens[0]], 1), "token_decoder.decoder_1.0"
                ).reshape(-1, 256, 14, 14)
            conv = 3 if d == 1 else 1
            extra = F.interpolate(extra, scale_factor=2, mode="bilinear", align_corners=False)
            c = f"token_decoder.decoder_{d}.{conv}"
            extra = F.relu(
                bn(
                    F.conv2d(extra, state[f"{c}.weight"], state[f"{c}.bias"], padding=1),
                    f"token_decoder.decoder_{d}.{conv + 1}",
                )
            )
            if d == 4:
                extra = torch.tanh(
                    F.conv2d(
                        extra,
                        state["token_decoder.decoder_4.4.weight"],
                        state["token_decoder.decoder_4.4.bias"],
                        padding=1,
                    )
                )
            x = x + F.conv2d(extra, state[f"token_zero_conv_{i}.weight"], state[f"token_zero_conv_{i}.bias"])
    return torch.sigmoid(F.conv2d(x, state["conv.weight"], state["conv.bias"]))


def test_smirk_synthesizer_against_a_second_implementation():
    net = randomise(SmirkSynthesizer(PAPER))
    a, b = torch.rand(2, 1, 3, 64, 48)
    assert torch.allclose(net(a, b), reference_synthesizer(net.state_dict(), a, b), atol=1e-5)


def test_teaser_synthesizer_against_a_second_implementation():
    net = Synthesizer(PAPER)
    for i in (1, 2, 3, 4):
        torch.nn.init.normal_(getattr(net, f"token_zero_conv_{i}").weight, std=0.05)
    randomise(net)
    a, b = torch.rand(2, 1, 3, 224, 224)
    tokens = torch.randn(4, 1, 256)
    ours, again = net(a, b, tokens), reference_synthesizer(net.state_dict(), a, b, tokens)
    assert torch.allclose(ours, again, atol=2e-5) and ours.std() > 1e-3
    assert (net(a, b, tokens.flip(0)) - ours).abs().max() > 1e-3


def test_token_encoder_reads_the_four_levels():
    net = randomise(TokenEncoder(PAPER)).double()
    x = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    maps = reference_backbone({n.removeprefix("encoder."): v for n, v in net.state_dict().items()}, "small", x)
    for i, (m, cells) in enumerate(zip(maps[:0:-1], (1, 2, 4, 8))):
        side = m.shape[-1] // cells
        pooled = m.unfold(2, side, side).unfold(3, side, side).mean((-1, -2)).flatten(1)
        layer = net.token_layers[i][0]
        assert torch.allclose(net(x)[i], pooled @ layer.weight.t() + layer.bias, atol=1e-10)


@pytest.mark.slow
def test_timm_itself_where_it_is_installed():
    "The same features as timm's own networks, from the same tensors; the result is kept in evidence/."
    try:
        import timm
    except Exception as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    found = {"timm": timm.__version__, "largest_relative_difference": {}}
    for size in ("small", "large"):
        theirs = randomise(
            timm.create_model(f"tf_mobilenetv3_{size}_minimal_100", pretrained=False, features_only=True)
        )
        ours = MobileNetV3(size).requires_grad_(False)
        ours.load_state_dict(theirs.state_dict())
        assert shapes_of(theirs) == timm_shapes(size)
        for side in ((224, 224), (128, 96), (65, 101)):
            x = torch.rand(2, 3, *side, generator=torch.Generator().manual_seed(1))
            difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours.eval()(x), theirs(x)))
            assert difference < 1e-5
            found["largest_relative_difference"][f"{size} {side[0]}x{side[1]}"] = difference
    (Path(__file__).parents[2] / "evidence" / "backbones_against_timm.json").write_text(
        json.dumps(found, indent=1) + "\n"
    )


def test_mica_and_resnet_against_second_implementations():
    net = randomise(Mica((1, 1, 1, 1))).double()
    s, x = net.state_dict(), torch.rand(1, 3, 112, 112, dtype=torch.float64)
    bn = lambda x, n: F.batch_norm(x, s[f"{n}.running_mean"], s[f"{n}.running_var"], s[f"{n}.weight"], s[f"{n}.bias"])
    y = F.prelu(bn(F.conv2d(2 * x - 1, s["arcface.conv1.weight"], padding=1), "arcface.bn1"), s["arcface.prelu.weight"])
    for i in (1, 2, 3, 4):
        b = f"arcface.layer{i}.0"
        z = F.prelu(
            bn(F.conv2d(bn(y, f"{b}.bn1"), s[f"{b}.conv1.weight"], padding=1), f"{b}.bn2"), s[f"{b}.prelu.weight"]
        )
        y = bn(F.conv2d(z, s[f"{b}.conv2.weight"], padding=1, stride=2), f"{b}.bn3") + bn(
            F.conv2d(y, s[f"{b}.downsample.0.weight"], stride=2), f"{b}.downsample.1"
        )
    y = bn(F.linear(bn(y, "arcface.bn2").flatten(1), s["arcface.fc.weight"], s["arcface.fc.bias"]), "arcface.features")
    y = y / y.norm(dim=1, keepdim=True)
    for i in range(4):
        y = F.linear(y, s[f"regressor.network.{i}.weight"], s[f"regressor.network.{i}.bias"])
        y = torch.maximum(y, 0.2 * y)
    assert torch.allclose(net(x), F.linear(y, s["regressor.output.weight"], s["regressor.output.bias"]), atol=1e-10)

    net = randomise(EmotionResNet50((2, 1, 1, 1))).double()
    s, y = net.state_dict(), torch.rand(1, 3, 64, 64, dtype=torch.float64)
    bn = lambda x, n: F.batch_norm(x, s[f"{n}.running_mean"], s[f"{n}.running_var"], s[f"{n}.weight"], s[f"{n}.bias"])
    reference = F.max_pool2d(
        F.pad(F.relu(bn(F.conv2d(y, s["conv1.weight"], stride=2, padding=3), "bn1")), (1, 1, 1, 1)), 3, 2
    )
    for b, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2), ("layer3.0", 2), ("layer4.0", 2)):
        z = F.relu(bn(F.conv2d(reference, s[f"{b}.conv1.weight"]), f"{b}.bn1"))
        z = F.relu(bn(F.conv2d(z, s[f"{b}.conv2.weight"], stride=stride, padding=1), f"{b}.bn2"))
        z = bn(F.conv2d(z, s[f"{b}.conv3.weight"]), f"{b}.bn3")
        if f"{b}.downsample.0.weight" in s:
            reference = bn(F.conv2d(reference, s[f"{b}.downsample.0.weight"], stride=stride), f"{b}.downsample.1")
        reference = F.relu(z + reference)
    assert torch.allclose(net(y), reference.mean((2, 3)), atol=1e-10)


def test_vgg_taps_and_shift():
    net = Vgg16().double()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    y, maps, convolution = (
        (x * 0.5 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
        [],
        0,
    )
    for width in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512):
        if width == "pool":
            maps.append(y)
            y = F.max_pool2d(y, 2)
            convolution += 1
            continue
        y = F.relu(F.conv2d(y, net.features[convolution].weight, net.features[convolution].bias, padding=1))
        convolution += 2
    for ours, reference in zip(net(x), maps + [y]):
        assert torch.allclose(ours, reference, atol=1e-6)


def test_adain_is_instance_normalisation_with_a_finite_gradient():
    adain = AdaIN(3).double()
    x, token = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 256, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda x: adain(x, token), x)


# ---- ranges ------------------------------------------------------------------------------------------------------------


def test_soft_range_has_the_values_of_the_clamp_and_never_traps():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(400, generator=generator) * 2).requires_grad_()
    target = torch.rand(400, generator=generator)
    for kind in ("smirk", "soft"):
        assert torch.equal(limit(x, 0, 1, kind), x.detach().clamp(0, 1))
    (limit(x, 0, 1, "soft") - target).square().sum().backward()
    outside = (x < 0) | (x > 1)
    assert (x.grad[outside] != 0).all() and (x.grad[outside].sign() == x.detach()[outside].sign()).all()
    y = x.detach().requires_grad_()
    (limit(y, 0, 1, "smirk") - target).square().sum().backward()
    assert (y.grad[outside] == 0).all() and torch.equal(y.grad[~outside], x.grad[~outside])


@pytest.mark.parametrize("kind", ["smirk", "soft"])
def test_outputs_stay_within_smirks_ranges(kind):
    encoder = ExpressionEncoder(NetworkConfig(output_range=kind))
    torch.nn.init.normal_(encoder.expression_layers[-1].weight, std=5.0)
    expression, eyelids, jaw = encoder(torch.rand(4, 3, 64, 64))
    assert (
        expression.abs().max() > 1
        and 0 <= eyelids.min()
        and eyelids.max() <= 1
        and jaw[:, 0].min() >= 0
        and jaw[:, 1:].abs().max() <= 0.2
    )


def test_first_outputs_are_near_the_mean_face():
    for config in (PAPER, SMALL):
        with torch.no_grad():
            params = GeometryEncoders(config).eval()(torch.rand(2, 3, 64, 96))
        assert torch.equal(params.shape, torch.zeros(2, 300)) and torch.equal(
            params.camera[:, 0], torch.full((2,), 7.0)
        )
        assert params.expression.abs().max() < 1 and params.rotation.abs().max() < 0.02 and params.jaw.abs().max() < 0.2


def test_parameters_stay_in_float32_under_autocast():
    model, x = FieldsModel(SMALL, FLAME, seed=0), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain, plain_tokens = model.encode(x), model.tokens(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            params, tokens, image = model.encode(x), model.tokens(x), model.synthesize(x, x, plain_tokens)
    assert all(
        t.dtype == torch.float32 for t in (params.camera, params.shape, params.expression, params.jaw, tokens, image)
    )
    assert (params.camera - plain.camera).abs().max() < 5e-3 and (
        image - model.synthesize(x, x, plain_tokens)
    ).abs().max() < 0.05


def test_small_networks_do_not_look_at_the_rest_of_the_batch():
    model, x = FieldsModel(SMALL, FLAME, seed=0).train(), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model.encode(x).expression[:1], model.encode(x[:1]).expression, atol=1e-5)
        tokens = model.tokens(x)
        assert torch.allclose(
            model.synthesize(x, x, tokens)[1:2], model.synthesize(x[1:2], x[1:2], tokens[:, 1:2]), atol=1e-5
        )


# ---- masking -----------------------------------------------------------------------------------------------------------


def test_dilation_against_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = (torch.rand(2, 1, 40, 33, generator=torch.Generator().manual_seed(0)) > 0.97).float()
    for radius in (0, 1, 5):
        expected = np.stack(
            [ndimage.binary_dilation(m, np.ones((2 * radius + 1,) * 2)) for m in mask[:, 0].numpy() > 0]
        )
        assert np.array_equal(dilate(mask, radius)[:, 0].numpy() > 0, expected)


def test_background_scales_with_the_image_and_keeps_gradients_out():
    for size, radius in ((224, 10), (112, 5), (64, 3)):
        hull = torch.zeros(1, 1, size, size)
        hull[..., size // 2, size // 2] = 1
        assert background(hull, torch.zeros_like(hull)).sum() == size * size - (2 * radius + 1) ** 2


def cube():
    "A unit cube seen from the front: depth grows away from the viewer."
    v = torch.tensor([[x, y, z] for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)])[None]
    quads = [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]
    return v, torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])


def test_sparse_points_lie_on_the_front_and_follow_the_weights():
    v, faces = cube()
    centre = v.mean(1, keepdim=True)
    outwards = torch.linalg.cross(v[0, faces[:, 1]] - v[0, faces[:, 0]], v[0, faces[:, 2]] - v[0, faces[:, 0]])
    assert ((v[0, faces].mean(1) - centre[0]) * outwards).sum(1).min() > 0
    points = sample_points(v, faces, torch.ones(12), 600, torch.Generator().manual_seed(1))
    depth = (v[0, points.faces[0]] * points.barycentric[0][..., None]).sum(1)[:, 2]
    assert (depth < 0).all()
    weights = torch.ones(12)
    weights[0] = 0
    points = sample_points(v, faces, weights, 600, torch.Generator().manual_seed(1))
    assert not (points.faces == faces[0]).all(-1).any()
    assert (points.barycentric >= 0).all()


def test_sparse_pixels_are_repeatable_and_outside_points_are_clamped():
    v, faces = cube()
    draw = lambda: paste_pixels(
        torch.zeros(1, 3, 64, 64),
        torch.full((1, 3, 64, 64), 0.7),
        *[sample_points(v * 3, faces, torch.ones(12), 80, torch.Generator().manual_seed(4)).pixels(v * 3, (64, 64))]
        * 2,
        torch.Generator().manual_seed(5),
    )
    assert torch.equal(draw(), draw()) and 0 < (draw() > 0).float().mean() < 0.05
    assert draw().max() <= 1


def test_region_weights_of_later_rows_win():
    faces = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    weights = region_weights(
        faces, {"neck": torch.tensor([0, 3]), "forehead": torch.tensor([5]), "lips": torch.tensor([8])}
    )
    assert weights.tolist() == [0.0, 1.0, 0.5]


def test_alignment_is_a_similarity():
    angle = 0.4
    r = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    points = (torch.tensor(ARCFACE_POINTS) - 30) @ r.t() * 1.7 + torch.tensor([80.0, 40.0])
    m = alignment(points[None])[0]
    assert torch.allclose(points @ m[:, :2].t() + m[:, 2], torch.tensor(ARCFACE_POINTS), atol=1e-3)
    noisy = alignment(points[None] + torch.randn(1, 5, 2))[0, :, :2]
    assert torch.allclose(noisy @ noisy.t(), (noisy**2).sum() / 2 * torch.eye(2), atol=1e-6)
    assert align(torch.rand(2, 3, 200, 150), points[None].repeat(2, 1, 1)).shape == (2, 3, 112, 112)


# ---- the assembled model ---------------------------------------------------------------------------------------------


def snapshot(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def moved(model, old):
    return {
        ".".join(n.split(".")[:2]) if n.startswith("encoders") else n.split(".")[0]
        for n, v in model.state_dict().items()
        if not torch.equal(v, old[n])
    }


@pytest.mark.parametrize("size", ["small", "paper"])
def test_frozen_parts_do_not_move_in_either_pass(size):
    "Weights and BatchNorm statistics of what is frozen are bit-identical, and no gradient reaches them."
    config = NetworkConfig(size=size, image_size=64, output_range="soft")
    model, x = FieldsModel(config, FLAME, seed=0), torch.rand(2, 3, 64, 64)
    old = snapshot(model)
    optimiser = torch.optim.SGD(model.set_trainable("shape", "expression", "tokens", "emotion"), 1e-2)
    params, tokens = model.encode(x), model.tokens(x)
    out = model.emotion(params)
    image = model.synthesize(x * (1 + params.expression.mean()), x, tokens)
    (
        (image - x).abs().mean()
        + out.valence.square().mean()
        + out.logits.square().mean()
        + (params.shape - 1).square().mean()
    ).backward()
    assert all(p.grad is None for name in ("pose", "synthesizer") for p in model.parts[name].parameters())
    optimiser.step()
    assert moved(model, old) == {
        "encoders.shape_encoder",
        "encoders.expression_encoder",
        "token_encoder",
        "emotion_head",
    }
    for p in model.parameters():
        p.grad = None
    old = snapshot(model)
    optimiser = torch.optim.SGD(model.set_trainable("synthesizer"), 1e-2)
    image = model.synthesize(x, x, model.tokens(x).detach())
    ((image - x).abs().mean() + model.encode(image).expression.square().mean()).backward()
    assert all(
        p.grad is None
        for name in ("pose", "shape", "expression", "tokens", "emotion")
        for p in model.parts[name].parameters()
    )
    optimiser.step()
    assert moved(model, old) == {"synthesizer"}


def test_checkpoint_round_trip_and_refusals(tmp_path):
    model, x = FieldsModel(SMALL, FLAME, method="F4", seed=1), torch.rand(3, 3, 64, 64)
    path = model.save(tmp_path / "m.safetensors", step=7)
    loaded = FieldsModel.load(path, FLAME)
    assert read_tensors(path)[1]["step"] == "7" and loaded.method == "F4" and not loaded.training
    a, b = model.predict(x, list("abc")), loaded.predict(x, list("abc"), batch=1)
    assert torch.allclose(a.params.features, b.params.features, atol=1e-5) and torch.allclose(
        a.logits, b.logits, atol=1e-5
    )
    with pytest.raises(ValueError, match="not interchangeable") as error:
        FieldsModel.load(path, SimpleNamespace(sha256="0" * 64, name="open"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        FieldsModel.load(tmp_path / "cut.safetensors", FLAME)
    state, header = read_tensors(path)
    for change, message in (
        (lambda s: s.pop("emotion_head.layers.0.weight"), "1 missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected"),
        (lambda s: s.update({"synthesizer.conv.bias": torch.zeros(5)}), "of another shape"),
    ):
        changed = dict(state)
        change(changed)
        save_tensors(tmp_path / "c.safetensors", changed, header)
        with pytest.raises(ValueError, match=message):
            FieldsModel.load(tmp_path / "c.safetensors", FLAME)
    save_tensors(tmp_path / "c.safetensors", state, header | {"version": "2"})
    with pytest.raises(ValueError, match="checkpoint version 2"):
        FieldsModel.load(tmp_path / "c.safetensors", FLAME)
    save_tensors(tmp_path / "c.safetensors", state, header | {"config": json.dumps({"size": "small", "depth": 3})})
    with pytest.raises(ValueError, match="does not know"):
        FieldsModel.load(tmp_path / "c.safetensors", FLAME)


def test_a_save_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {})
    before = path.read_bytes()

    def half_written(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_file, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, {"x": torch.ones(3)}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_nan_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match="x is not finite"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.tensor(float("nan"))}, {})
    assert not list(tmp_path.iterdir())


def test_smirk_kind_has_neither_tokens_nor_emotion(tmp_path):
    model = FieldsModel(SMALL, FLAME, kind="smirk", emotion=False, seed=0)
    x = torch.rand(2, 3, 64, 64)
    assert (
        model.tokens(x) is None and model.emotion(model.encode(x)) is None and model.synthesize(x, x).shape == x.shape
    )
    loaded = FieldsModel.load(model.save(tmp_path / "s.safetensors"), FLAME)
    assert loaded.kind == "smirk" and loaded.predict(x, ["a", "b"]).logits is None
    with pytest.raises(ValueError, match="'teaser' or 'smirk'"):
        FieldsModel(SMALL, FLAME, kind="emoca")


# ---- official files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,reader", [("smirk", checkpoints.import_smirk), ("teaser", checkpoints.import_teaser)])
def test_published_model_is_read_and_every_change_refused(kind, reader, tmp_path):
    shapes = official_shapes(kind)
    state = fabricate(shapes)
    marked = random.Random(0).sample(sorted(n for n in shapes if not n.endswith("tracked")), 4)
    marked += [f"{kind}_generator.conv.bias", f"{kind}_encoder.expression_encoder.expression_layers.0.bias"]
    for i, n in enumerate(marked):
        state[n] = torch.full((1,), 1.0 + i).expand(shapes[n])
    path = tmp_path / f"{kind}.pt"
    torch.save(state, path)
    model = reader(path, FLAME)
    own = {checkpoints._official(n, kind): v for n, v in model.state_dict().items()}
    assert all(torch.equal(own[n], state[n]) for n in marked) and own.keys() == state.keys() and not model.training
    assert model.predict(torch.rand(1, 3, 64, 64), ["a"]).head_sha256 == FLAME.sha256
    del model, own
    refused = lambda changed, message: (torch.save(changed, path), pytest.raises(ValueError, match=message))[1]
    for n in marked[:1]:
        without = {k: v for k, v in state.items() if k != n}
        with refused(without, "1 missing") as error:
            reader(path, FLAME)
        assert n in str(error.value) and "\n" not in str(error.value)
        with refused(without | {n + "_old": state[n]}, "1 missing.*1 unexpected"):
            reader(path, FLAME)
        with refused(state | {n: torch.zeros(*shapes[n], 2)}, "1 of another shape"):
            reader(path, FLAME)
        with refused(state | {n: "a string"}, "1 of another kind"):
            reader(path, FLAME)
    for n in marked[1:] + random.Random(1).sample(sorted(shapes), 25):  # more names, in memory
        s = shapes[n]
        for changed in (
            {k: v for k, v in state.items() if k != n},
            state | {n: torch.zeros(*s, 2)},
            {(k + "x" if k == n else k): v for k, v in state.items()},
        ):
            with pytest.raises(ValueError):
                check_tensors(shapes, changed, path, kind)


def test_wrong_files_are_named(tmp_path):
    smirk, teaser = fabricate(official_shapes("smirk")), fabricate(official_shapes("teaser"))
    arcface, mapping = mica_shapes()
    files = {
        "smirk": smirk,
        "teaser": teaser,
        "mica": {"arcface": fabricate(arcface), "flameModel": fabricate(mapping)},
        "vgg": fabricate(checkpoints.vgg16_shapes()),
        "small": fabricate(timm_shapes("small")),
        "large": fabricate(timm_shapes("large")),
        "emotion": {"state_dict": fabricate({f"backbone.{n}": s for n, s in resnet50_shapes().items()})},
    }
    for kind, state in files.items():
        torch.save(state, tmp_path / f"{kind}.pt")
    readers = {
        "smirk": lambda p: checkpoints.import_smirk(p, FLAME),
        "teaser": lambda p: checkpoints.import_teaser(p, FLAME),
        "mica": checkpoints.import_mica,
        "vgg": checkpoints.import_vgg16,
        "small": lambda p: checkpoints.import_backbone(p, "small"),
        "large": lambda p: checkpoints.import_backbone(p, "large"),
        "emotion": checkpoints.import_emotion,
    }
    for expected, reader in readers.items():
        for given in files:
            if given == expected:
                continue
            with pytest.raises(ValueError) as error:
                reader(tmp_path / f"{given}.pt")
            assert f"is {checkpoints.KINDS[given]}, and {checkpoints.KINDS[expected]}" in str(
                error.value
            ) and "\n" not in str(error.value)
    for kind in ("mica", "vgg", "small", "large", "emotion"):
        readers[kind](tmp_path / f"{kind}.pt")


def test_other_heads_are_refused_for_official_coefficients(tmp_path):
    torch.save(fabricate(official_shapes("smirk")), tmp_path / "s.pt")
    head = SimpleNamespace(sha256="1" * 64, name="flame2023_open", version="FLAME 2023 Open")
    with pytest.raises(ValueError, match="belong to FLAME 2020, and the head is flame2023_open"):
        checkpoints.import_smirk(tmp_path / "s.pt", head)
    assert checkpoints.import_smirk(tmp_path / "s.pt", head, any_head=True).head_sha256 == head.sha256


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    "reader",
    [
        lambda p: checkpoints.import_smirk(p, FLAME),
        checkpoints.import_mica,
        checkpoints.import_vgg16,
        checkpoints.import_emotion,
        lambda p: checkpoints.import_backbone(p, "small"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused(reader, zipped, tmp_path):
    torch.save(
        {"conv_stem.weight": RunsCode(tmp_path / "ran")}, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match="nothing of it was read"):
        reader(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    p = tmp_path / "x.pt"
    for content, message in (
        (b"<html>quota", "web page"),
        (b"", "not a"),
        (b"hello", "not a"),
        (random.Random(0).randbytes(4000), "not a"),
        (b"PK\x03\x04" + b"0" * 300, "not a"),
    ):
        p.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            checkpoints.import_smirk(p, FLAME)
    torch.save(torch.zeros(3), p)
    with pytest.raises(ValueError, match="holds a Tensor, not named tensors"):
        checkpoints.import_smirk(p, FLAME)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoints.import_smirk(tmp_path / "none.pt", FLAME)


def test_timm_file_with_half_a_classifier_is_refused(tmp_path):
    state = fabricate(timm_shapes("small"))
    top = {
        "conv_head.weight": (1024, 576, 1, 1),
        "conv_head.bias": (1024,),
        "classifier.weight": (1000, 1024),
        "classifier.bias": (1000,),
    }
    torch.save(state | fabricate(top), tmp_path / "s.pth")
    assert count(checkpoints.import_backbone(tmp_path / "s.pth", "small")) == 428888
    torch.save(state | fabricate({"classifier.bias": (1000,)}), tmp_path / "s.pth")
    with pytest.raises(ValueError, match="3 missing"):
        checkpoints.import_backbone(tmp_path / "s.pth", "small")
    torch.save(state | {"blocks.0.0.se.conv_reduce.weight": torch.zeros(8, 16, 1, 1)}, tmp_path / "s.pth")
    with pytest.raises(ValueError, match="1 unexpected"):
        checkpoints.import_backbone(tmp_path / "s.pth", "small")


# ---- learning ----------------------------------------------------------------------------------------------------------


def test_small_encoder_learns_where_something_is():
    "A dot's position can be read to a fraction of a pixel after a short training: the pooling keeps positions."
    torch.manual_seed(0)

    def dots(n):
        where = torch.rand(n, 2) - 0.5
        y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
        return (-((x - where[:, 0, None, None]) ** 2 + (y - where[:, 1, None, None]) ** 2) / 0.02).exp()[
            :, None
        ].expand(-1, 3, -1, -1), where

    encoder = ExpressionEncoder(SMALL)
    optimiser = torch.optim.Adam(encoder.parameters(), 1e-3)
    for _ in range(60):
        image, where = dots(16)
        loss = (encoder(image)[0][:, :2] - where).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    image, where = dots(32)
    with torch.no_grad():
        error = (encoder(image)[0][:, :2] - where).square().mean().sqrt()
    assert error < 0.1 * where.std() * 3


def test_modules_run_in_a_fresh_interpreter_without_optional_packages():
    code = (
        "import sys\nfor name in ('timm', 'torchvision', 'mediapipe', 'matplotlib', 'cv2', 'numba', 'kornia'): sys.modules[name] = None\n"
        "import torch\nfrom types import SimpleNamespace\nfrom fields.config import NetworkConfig\nfrom fields.models.fields import FieldsModel\nimport fields.models.checkpoints\n"
        "m = FieldsModel(NetworkConfig(), SimpleNamespace(sha256='0', name='x'))\nprint(m.predict(torch.rand(1, 3, 64, 64), ['a']).params.camera.shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and "[1, 3]" in out.stdout, out.stderr
