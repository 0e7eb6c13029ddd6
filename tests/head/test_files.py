"""Head files: every format reads equal, nothing in a file ever runs, and damaged files are refused in one sentence."""

import io
import os
import pickle
import struct
import time
import types
from pathlib import Path

import numpy as np
import pytest

from fields.head.files import SETS, add_side_files, read_embeddings, read_head, toy_arrays
from fields.head.pickles import HeadFileError, parse_pickle, read_arrays

TOY = toy_arrays(np.random.default_rng(3), splits=1)  # 18 vertices: small files, many mutations
TOY = {
    k: v.astype(np.float32)
    if isinstance(v, np.ndarray) and v.dtype == np.float64 and k in ("shapedirs", "posedirs")
    else v
    for k, v in TOY.items()
}
KEYS = ("template", "faces", "shapedirs", "posedirs", "joint_regressor", "weights")


def real_data():
    folder = os.environ.get("FIELDS_TEST_DATA")
    if not folder or not Path(folder, "head").is_dir():
        pytest.skip("needs the extra test data (FIELDS_TEST_DATA)")
    return Path(folder, "head")


# --- an emitter of Python-2 pickles, as the official files are written: byte strings, chumpy objects, old scipy paths


def py2_text(value):
    return (
        b"U" + bytes([len(value)]) + value.encode()
        if len(value) < 256
        else b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
    )


def py2_tuple(*items):
    return b"(" + b"".join(items) + b"t"


def py2_int(value):
    return b"J" + struct.pack("<i", value)


def py2_array(a, module="numpy.core.multiarray"):
    a = np.asarray(a)
    data = (
        np.asfortranarray(a).tobytes("F")
        if a.ndim > 1 and a.flags.f_contiguous and not a.flags.c_contiguous
        else np.ascontiguousarray(a).tobytes()
    )
    fortran = b"\x88" if a.ndim > 1 and a.flags.f_contiguous and not a.flags.c_contiguous else b"\x89"
    dtype = (
        b"cnumpy\ndtype\n"
        + py2_tuple(py2_text(a.dtype.str[1:]), py2_int(0), py2_int(1))
        + b"R"
        + py2_tuple(py2_int(3), py2_text("<"), b"N", b"N", b"N", py2_int(-1), py2_int(-1), py2_int(0))
        + b"b"
    )
    made = (
        b"c"
        + module.encode()
        + b"\n_reconstruct\n"
        + py2_tuple(b"cnumpy\nndarray\n", py2_tuple(py2_int(0)), py2_text("b"))
        + b"R"
    )
    return (
        made
        + py2_tuple(
            py2_int(1),
            py2_tuple(*(py2_int(n) for n in a.shape)),
            dtype,
            fortran,
            b"T" + struct.pack("<i", len(data)) + data,
        )
        + b"b"
    )


def py2_object(module, name, state):
    return f"c{module}\n{name}\n".encode() + b")\x81}(" + b"".join(py2_text(k) + v for k, v in state.items()) + b"ub"


def py2_sparse(dense, module="scipy.sparse.csc"):
    from scipy.sparse import csc_matrix

    m = csc_matrix(dense)
    return py2_object(
        module,
        "csc_matrix",
        {
            "_shape": py2_tuple(*(py2_int(n) for n in m.shape)),
            "maxprint": py2_int(50),
            "data": py2_array(m.data),
            "indices": py2_array(m.indices),
            "indptr": py2_array(m.indptr),
        },
    )


def py2_head(arrays, chumpy=("v_template", "shapedirs", "posedirs", "weights")):
    body = b""
    for k, v in arrays.items():
        if isinstance(v, str):
            body += py2_text(k) + py2_text(v)
        elif k == "J_regressor":
            body += py2_text(k) + py2_sparse(v)
        elif k in chumpy:
            body += py2_text(k) + py2_object("chumpy.ch", "Ch", {"x": py2_array(v)})
        else:
            body += py2_text(k) + py2_array(v)
    return b"\x80\x02}(" + body + b"u."


class Stub:
    def __setstate__(self, state):
        self.state = state


class Reference(pickle.Unpickler):
    """Python's own unpickler with numpy's and scipy's own classes; chumpy objects become stubs."""

    def find_class(self, module, name):
        if module.startswith("chumpy"):
            return Stub
        if module.startswith("scipy.sparse"):
            module = "scipy.sparse"
        return super().find_class(module, name)


def reference_arrays(data):
    found = Reference(io.BytesIO(data), encoding="latin1").load()
    out = {}
    for k, v in found.items():
        if isinstance(v, Stub):
            v = v.state.get("x")
        if hasattr(v, "toarray"):
            v = v.toarray()
        out[k] = v
    return out


def same_head(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in KEYS) and a.parents == b.parents


# --- formats


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path, protocol):
    path = tmp_path / "head.pkl"
    path.write_bytes(pickle.dumps(TOY, protocol))
    head = read_head(path)
    assert np.array_equal(head.template, TOY["v_template"]) and np.array_equal(head.shapedirs, TOY["shapedirs"])
    assert head.shapedirs.dtype == np.float32 and head.parents == (-1, 0, 1, 1, 1) and len(head.sha256) == 64


def test_chumpy_equals_plain(tmp_path):
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(TOY, 2))
    (tmp_path / "chumpy.pkl").write_bytes(py2_head(TOY))
    a, b = read_head(tmp_path / "plain.pkl"), read_head(tmp_path / "chumpy.pkl")
    assert same_head(a, b) and a.sha256 != b.sha256


def test_module_paths_old_and_new(tmp_path):
    for array_module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        for sparse_module in ("scipy.sparse.csc", "scipy.sparse._csc"):
            body = (
                py2_text("a")
                + py2_array(np.arange(6.0).reshape(2, 3), array_module)
                + py2_text("s")
                + py2_sparse(np.eye(3, 5), sparse_module)
            )
            (tmp_path / "x.pkl").write_bytes(b"\x80\x02}(" + body + b"u.")
            found = read_arrays(tmp_path / "x.pkl")
            assert np.array_equal(found["a"], np.arange(6.0).reshape(2, 3)) and np.array_equal(found["s"], np.eye(3, 5))


def test_column_order_and_big_endian(tmp_path):
    content = {
        "f": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "b": np.arange(5, dtype=">i4"),
        "s": np.float64(2.5),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 4))
    found = read_arrays(tmp_path / "x.pkl")
    assert np.array_equal(found["f"], content["f"]) and np.array_equal(found["b"], content["b"]) and found["s"] == 2.5


def test_versions(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(TOY | {"supr_expression_metadata": {"n_expr": 100}}))
    assert "2023 Open" in read_head(tmp_path / "a.pkl").version
    from fields.head.files import parse_official

    assert parse_official(TOY, "efcd14cc" + "0" * 56, "a").version == "FLAME 2020"
    assert parse_official(TOY, "e75a0990" + "0" * 56, "a").name == "flame2023_open"


def test_chumpy_file_of_test_data():
    folder = real_data()
    assert same_head(read_head(folder / "generic_model.pkl"), read_head(folder / "generic_model_chumpy.pkl"))


def test_against_reference_reader_on_test_data():
    folder = real_data()
    for name in ("generic_model.pkl", "generic_model_chumpy.pkl"):
        expected, head = reference_arrays((folder / name).read_bytes()), read_head(folder / name)
        for official, ours in (
            ("v_template", "template"),
            ("f", "faces"),
            ("shapedirs", "shapedirs"),
            ("posedirs", "posedirs"),
            ("J_regressor", "joint_regressor"),
            ("weights", "weights"),
        ):
            assert np.array_equal(np.asarray(expected[official]), getattr(head, ours)), official


def test_torch_tensors_in_a_pickle():
    folder = real_data()
    a, b = (read_embeddings(folder / n, 9976) for n in ("landmark_embedding.npy", "landmark_embedding_orig_torch.npy"))
    for name in ("static51", "contour17", "full68"):
        assert np.array_equal(a[name].face_index, b[name].face_index) and np.array_equal(
            a[name].barycentric, b[name].barycentric
        )


def test_side_files_of_test_data():
    head = read_head(real_data() / "generic_model.pkl")
    assert set(head.embeddings) == {"static51", "contour17", "full68", "mediapipe105", "points203"}
    assert len(head.masks) == 14 and head.eyelids.shape == (2, 5023, 3)
    assert set(head.embeddings["points203"].groups) == {"front", "left", "right"} and head.embeddings[
        "mediapipe105"
    ].indices.shape == (105,)


# --- files that try to run code


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_never_run(tmp_path, protocol):
    import builtins, codecs, importlib, operator, subprocess

    marker = tmp_path / "ran"
    attacks = [
        Runs(os.system, f"touch {marker}"),
        Runs(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Runs(builtins.exec, f"open({str(marker)!r}, 'w')"),
        Runs(subprocess.run, ["touch", str(marker)]),
        Runs(builtins.open, str(marker), "w"),
        Runs(operator.attrgetter, "a.b"),
        Runs(importlib.import_module, "antigravity"),
        Runs(np.load, str(marker)),
        Runs(np.save, str(marker), np.zeros(1)),
        Runs(codecs.encode, "a", "rot13"),
        Runs(builtins.getattr, "a", "b"),
        Runs(types.SimpleNamespace),
    ]
    for attack in attacks:
        for content in (attack, TOY | {"v_template": attack}, TOY | {"extra": [attack]}, {"a": {"b": attack}}):
            path = tmp_path / "evil.pkl"
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(HeadFileError) as e:
                read_head(path)
            assert "\n" not in str(e.value) and str(path) in str(e.value)
            array = np.empty((), object)
            array[()] = content
            np.save(tmp_path / "evil.npy", array, allow_pickle=True)
            with pytest.raises(HeadFileError):
                read_embeddings(tmp_path / "evil.npy", 9976)
    np.savez(tmp_path / "evil.npz", template=np.array([attacks[0]], object))
    with pytest.raises(HeadFileError):
        read_head(tmp_path / "evil.npz")
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch /tmp/x'\nios\nsystem\n.",
        b"(cos\nsystem\nS'x'\no.",
        b"\x80\x02\x82\x01.",
        b"cos\nsystem\n(S'x'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"ctorch.storage\n_load_from_bytes\n(C\x12cos\nsystem\n(S'x'\ntRtR.",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"ccollections\nOrderedDict\n((lp0\ntR.",
        b"\x80\x02)\x81.",
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"(" * 5000 + b".",
        b"]" * 100000 + b"a" * 99999 + b".",
        b"",
    ],
)
def test_handmade_attacks(tmp_path, data):
    path = tmp_path / "evil.pkl"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(HeadFileError) as e:
        read_head(path)
    assert "\n" not in str(e.value) and time.perf_counter() - start < 5


def test_nested_sharing_stays_cheap():
    data = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100)) + b"."
    start = time.perf_counter()
    parse_pickle(io.BytesIO(data), "a.pkl")  # a tuple of 2^100 leaves, held as 100 pairs
    with pytest.raises(HeadFileError):
        parse_pickle(io.BytesIO(b"\x80\x02}" + data[2:-1] + b"Ns."), "a.pkl")  # ... as a dictionary key
    assert time.perf_counter() - start < 1


def test_zip_bomb(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("template.npy", "w") as entry:
            for _ in range(300):
                entry.write(bytes(1 << 20))
    with pytest.raises(HeadFileError, match="more than any head"):
        read_head(tmp_path / "bomb.npz")


# --- 300 damaged files


def own_npz():
    d = {
        "name": np.array("toy"),
        "version": np.array("1"),
        "template": TOY["v_template"].astype(np.float32),
        "faces": TOY["f"].astype(np.int32),
        "shapedirs": np.round(TOY["shapedirs"] / 1e-5).astype(np.int16),
        "shapedirs_scale": np.full(400, 1e-5),
        "posedirs": np.round(TOY["posedirs"] / 1e-5).astype(np.int16),
        "posedirs_scale": np.array(1e-5),
        "joint_regressor": TOY["J_regressor"],
        "weights": TOY["weights"].astype(np.float32),
        "parents": np.array([-1, 0, 1, 1, 1]),
        "eyelids": np.zeros((2, 18, 3), np.float32),
        "mask_face": np.arange(9),
        "shape_components": np.array(67),
        "expression_components": np.array(45),
    }
    rng = np.random.default_rng(0)
    for name, shape in SETS.items():
        key = {"contour17": "dynamic"}.get(name, name)
        b = rng.random((*shape, 3))
        d[f"{key}_faces"], d[f"{key}_bary"] = rng.integers(0, 32, shape), b / b.sum(-1, keepdims=True)
    return d


def packed(arrays, compress=True):
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def spoil(arrays, rng):
    """Return arrays with one thing wrong: a missing or misnamed key, a shape, a NaN, an index, a sum."""
    arrays, keys = dict(arrays), {"v_template": "v_template", "template": "template"}
    names = [
        k
        for k in (
            "v_template",
            "f",
            "shapedirs",
            "posedirs",
            "J_regressor",
            "weights",
            "kintree_table",
            "template",
            "faces",
            "joint_regressor",
            "parents",
        )
        if k in arrays
    ]
    name = names[rng.integers(len(names))]
    a = np.array(arrays[name])
    kind = ["missing", "renamed", "cut", "axis", "nan", "huge", "text", "type"][rng.integers(8)]
    if kind == "missing":
        del arrays[name]
    elif kind == "renamed":
        arrays[name + "_"] = arrays.pop(name)
    elif kind == "cut":
        arrays[name] = a[:, :-1] if name in ("f", "faces") else a[:-1]
    elif kind == "axis":
        arrays[name] = a[..., None] if a.ndim == 1 or rng.random() < 0.5 else a.reshape(-1)
    elif kind == "text":
        arrays[name] = np.array("hello")
    elif kind == "type":
        arrays[name] = a.astype(np.complex64)
    else:
        flat = a.copy().reshape(-1)
        if name in ("f", "faces"):
            flat[rng.integers(flat.size)] = 18 if kind == "nan" else 2**31 - 1
        elif name == "parents":
            flat[rng.integers(1, 5)] = 7
        elif name == "kintree_table":
            flat[rng.integers(1, 5)] = 7
        elif flat.dtype.kind == "i":
            arrays[name + "_scale"] = np.full(400 if name == "shapedirs" else (), np.nan)
        else:
            flat[rng.integers(flat.size)] = np.nan if kind == "nan" else 1e6
        arrays[name] = flat.reshape(a.shape)
    return arrays, f"{kind} {name}"


def refused(path, function):
    """Return the message of the refusal, or None where the file was accepted."""
    start = time.perf_counter()
    try:
        function()
    except HeadFileError as error:
        message = str(error)
        assert "\n" not in message and Path(path).name in message and len(message) < 400, message
        return message
    finally:
        assert time.perf_counter() - start < 10
    return None


@pytest.mark.parametrize("seed", [11, *(pytest.param(s, marks=pytest.mark.slow) for s in range(12, 22))])
def test_300_damaged_files(tmp_path, seed):
    rng, own = np.random.default_rng(seed), own_npz()
    bases = {
        "plain.pkl": pickle.dumps(TOY, 2),
        "chumpy.pkl": py2_head(TOY),
        "own.npz": packed(own),
        "stored.npz": packed(own, False),
    }
    whole = {}
    for name, data in bases.items():
        (tmp_path / name).write_bytes(data)
        whole[name] = read_head(tmp_path / name)
    counts = {"refused": 0, "the file's own values": 0}
    for trial in range(300):
        name = list(bases)[trial % 4]
        data, kind, path = bases[name], ("truncated", "flipped", "spoiled")[trial // 4 % 3], tmp_path / f"bad_{name}"
        if kind == "truncated":
            data = data[: rng.integers(1, len(data))]
        elif kind == "flipped":
            data = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                place = (
                    rng.integers(len(data))
                    if rng.random() < 0.4
                    else rng.choice([rng.integers(300), len(data) - 1 - rng.integers(300)])
                )
                data[place] ^= 1 << rng.integers(8)
            data = bytes(data)
        elif name == "plain.pkl":
            arrays, kind = spoil(TOY, rng)
            data = pickle.dumps(arrays, 2)
        elif name == "chumpy.pkl":
            arrays, kind = spoil(TOY, rng)
            data = (
                py2_head({k: v for k, v in arrays.items()})
                if "J_regressor" not in arrays
                or np.ndim(arrays["J_regressor"]) == 2
                and arrays["J_regressor"].dtype.kind == "f"
                else pickle.dumps(arrays)
            )
        else:
            arrays, kind = spoil(own, rng)
            data = packed(arrays, name == "own.npz")
        path.write_bytes(data)
        if refused(path, lambda: read_head(path)) is not None:
            counts["refused"] += 1
            continue
        assert kind == "flipped", f"{name} loads although {kind}"
        head = read_head(path)
        assert head.sha256 != whole[name].sha256  # results made with it never mix with those of the whole file
        try:
            expected = None if name.endswith(".npz") else reference_arrays(data)
        except Exception:
            expected = None  # Python's reader gives up where ours does not look
        if expected is None:
            assert same_head(head, whole[name])  # unharmed (zip checks its content by itself)
        else:
            for ours, official in (
                ("template", "v_template"),
                ("faces", "f"),
                ("shapedirs", "shapedirs"),
                ("posedirs", "posedirs"),
                ("joint_regressor", "J_regressor"),
                ("weights", "weights"),
            ):
                assert np.array_equal(getattr(head, ours), np.asarray(expected[official]))
        counts["the file's own values"] += 1
    print(counts)
    assert counts["refused"] >= 220, counts


def test_every_array_of_our_file_is_checked(tmp_path):
    own, path = (
        own_npz()
        | {
            "uv": np.zeros((18, 2), np.float32),
            "paint_attributes": np.zeros((18, 5), np.float32),
            "mediapipe105_indices": np.arange(105),
            "points203_front": np.arange(9),
        },
        tmp_path / "own.npz",
    )
    path.write_bytes(packed(own))
    read_head(path)
    harmless = {("name", "text"), ("version", "text")} | {
        (k, kind)
        for k in ("name", "version", "shape_components", "expression_components")
        for kind in ("axis", "text", "complex", "words")
    }
    for key, a in own.items():
        spoiled = {
            "axis": a[..., None],
            "text": np.array("hello"),
            "complex": a.astype(np.complex64) if a.dtype.kind != "U" else np.zeros(3),
            "words": np.full(a.shape, "x"),
        }
        if a.ndim and not key.startswith(("mask", "points203_front")):
            spoiled["cut"] = a[:-1]
        if a.dtype.kind == "f":
            spoiled["nan"] = np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a).astype(a.dtype)
        for kind, bad in spoiled.items():
            path.write_bytes(packed(own | {key: bad}, False))
            if refused(path, lambda: read_head(path)) is None:
                assert (key, kind) in harmless, (key, kind)
    for key, value in (
        ("template", "hello"),
        ("template", {}),
        ("template", TOY["v_template"]),
    ):  # our names in a pickle
        path.write_bytes(pickle.dumps({key: value, "name": 1}))
        assert refused(path, lambda: read_head(path))


def test_damaged_side_files(tmp_path):
    folder, rng = real_data(), np.random.default_rng(5)
    head = read_head(folder / "generic_model.pkl")
    names = (
        "landmark_embedding.npy",
        "landmark_embedding_orig_torch.npy",
        "mediapipe_landmark_embedding.npz",
        "203_landmark_embedding.npz",
    )
    whole = {n: read_embeddings(folder / n, 9976) for n in names}
    count = 0
    for trial in range(120):
        name = names[trial % 4]
        data = bytearray((folder / name).read_bytes())
        if trial // 4 % 2:
            data = data[: rng.integers(1, len(data))]
        else:
            data[rng.integers(600) if rng.random() < 0.5 else rng.integers(len(data))] ^= 1 << rng.integers(8)
        path = tmp_path / f"bad_{name}"
        path.write_bytes(bytes(data))
        if refused(path, lambda: read_embeddings(path, 9976)) is not None:
            count += 1
            continue
        for n, e in read_embeddings(path, 9976).items():  # what loads still lies on the head
            assert (
                e.face_index.shape == SETS[n]
                and e.face_index.max() < 9976
                and np.abs(e.barycentric.sum(-1) - 1).max() < 1e-3
            )
        assert not trial // 4 % 2
    assert count >= 70, count
    for name, bad in (
        ("l_eyelid.npy", np.zeros((5022, 3))),
        ("r_eyelid.npy", np.full((5023, 3), np.nan)),
        ("FLAME_masks.npz", None),
    ):
        other = tmp_path / name.split(".")[0]
        other.mkdir()
        for side in ("l_eyelid.npy", "r_eyelid.npy"):
            np.save(other / side, head.eyelids[0])
        if bad is None:
            np.savez(other / name, face=np.array([5023]))
        else:
            np.save(other / name, bad)
        with pytest.raises(HeadFileError):
            add_side_files(read_head(folder / "generic_model.pkl"), other)


def test_another_heads_embedding(tmp_path):
    np.savez(
        tmp_path / "mediapipe_landmark_embedding.npz",
        lmk_face_idx=np.full(105, 9000),
        lmk_b_coords=np.full((105, 3), 1 / 3),
    )
    (tmp_path / "toy.pkl").write_bytes(pickle.dumps(TOY))
    with pytest.raises(HeadFileError, match="another head"):
        read_head(tmp_path / "toy.pkl")
