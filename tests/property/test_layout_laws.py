"""Which loss would this catch? A rectangle that no rank holds or two ranks hold, a layer dealt out twice, a container
whose offsets, CRCs or pickles another program reads otherwise than we meant.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ferry.core import crc32
from ferry.core import family as roles
from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import FerryError, InputError, LayoutError
from ferry.core.layout import Local, padded_vocabulary
from ferry.core.pipeline import pipeline
from ferry.core.safetensors import make_header, parse_header, read_header
from ferry.families.registry import families, model_of
from ferry.formats.megatron_names import EXPERT_STYLES, MegatronLayout, rank_tensors
from ferry.formats.pickles import Call, Global, Instance, Tensor, read_pickle, write_pickle
from ferry.formats.torch_zip import check_crcs, open_torch, plan_zip

quick = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


# ---- layouts


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the config of a small model of any kind: grouped or not, tied or not, dense, with experts, or mixed."""
    groups = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.sampled_from([1, 2, 4]))
    config = {
        "hidden_size": draw(st.sampled_from([4, 6])), "num_hidden_layers": layers,
        "num_key_value_heads": groups, "num_attention_heads": groups * draw(st.integers(1, 3)), "head_dim": 2,
        "intermediate_size": 4 * draw(st.integers(1, 3)), "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()), "model_type": draw(st.sampled_from(["llama", "qwen2", "glm"])),
        "attention_bias": draw(st.booleans()),
    }  # fmt: skip
    if config["model_type"] == "llama":
        config["attention_bias"] = False
    if draw(st.booleans()):
        config |= {
            "model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True)),
        }  # fmt: skip
    return config


@quick
@given(config=configs(), data=st.data())
def test_every_rectangle_of_every_tensor_is_held_once_or_is_a_declared_copy(
    config: dict[str, Any], data: st.DataObject
) -> None:
    model = model_of(config, "config.json")
    tp = data.draw(st.sampled_from(model.legal_tp()))
    ep = data.draw(st.sampled_from(model.legal_ep()))
    pp = data.draw(st.sampled_from([n for n in (1, 2, 4) if model.dims.num_layers % n == 0]))
    padded = padded_vocabulary(model.dims.vocab_size, data.draw(st.sampled_from([1, 8])), tp)
    layout = MegatronLayout(
        tp=tp, pp=pp, ep=ep, padded_vocab=padded, experts=data.draw(st.sampled_from(EXPERT_STYLES))
    )  # fmt: skip
    held = {name: np.zeros((shape[0], *(shape[1:] or (1,))), int) for name, shape in model.canonical().items()}
    for chunk in pipeline(model.dims.num_layers, pp):
        for rank in range(tp):
            for expert_rank in range(ep):
                for local in rank_tensors(model, layout, chunk, rank, expert_rank).values():
                    assert_pieces_tile(local)
                    count_pieces(local, held)
    for name, counts in held.items():
        assert counts.min() == counts.max() == expected_copies(model.role_of(name), config, tp, pp, ep), name


def assert_pieces_tile(local: Local) -> None:
    """Every cell of a stored tensor is covered by exactly one piece, but the padding at its end."""
    cells = np.zeros((local.rows, local.cols), int)
    for piece in local.pieces:
        rows, cols = (piece.cols, piece.rows) if piece.transposed else (piece.rows, piece.cols)
        cells[piece.at_row : piece.at_row + rows, piece.at_col : piece.at_col + cols] += 1
    real = local.rows - local.pad_rows
    assert (cells[:real] == 1).all()
    assert (cells[real:] == 0).all()
    assert int(np.prod(local.shape)) == local.rows * local.cols


def count_pieces(local: Local, held: dict[str, Any]) -> None:
    for piece in local.pieces:
        held[piece.name][piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols] += 1


def expected_copies(role: str, config: dict[str, Any], tp: int, pp: int, ep: int) -> int:
    if role in roles.EXPERT_ROLES:
        return 1
    if role == roles.EMBEDDING:
        return ep * (2 if config["tie_word_embeddings"] and pp > 1 else 1)
    copied = (
        roles.ATTENTION_NORM, roles.MLP_NORM, roles.FINAL_NORM, roles.QUERY_NORM, roles.KEY_NORM, roles.ROUTER,
    )  # fmt: skip
    return ep * (tp if role in copied else 1)


@quick
@given(vocab_size=st.integers(1, 300_000), multiple=st.integers(1, 256), tp=st.integers(1, 16))
def test_the_padded_vocabulary_is_the_smallest_that_every_rank_shares_equally(
    vocab_size: int, multiple: int, tp: int
) -> None:
    padded = padded_vocabulary(vocab_size, multiple, tp)
    assert padded % (multiple * tp) == 0
    assert 0 <= padded - vocab_size < multiple * tp


# ---- pipelines


@quick
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 4), st.integers(0, 4), st.data())
def test_a_pipeline_deals_out_every_layer_once_in_order(
    layers: int, pp: int, vpp: int, noops: int, data: st.DataObject
) -> None:
    total = layers + noops
    assume(total % (pp * vpp) == 0)
    positions = data.draw(st.lists(st.integers(0, total - 1), min_size=noops, max_size=noops, unique=True))
    chunks = pipeline(layers, pp, vpp, noop_layers=tuple(positions))
    dealt = [layer for chunk in chunks for layer in chunk.layers]
    assert [layer for layer in dealt if layer is not None] == list(range(layers))
    assert [index for index, layer in enumerate(dealt) if layer is None] == sorted(positions)
    assert [(chunk.stage, chunk.virtual) for chunk in chunks] == [(b % pp, b // pp) for b in range(pp * vpp)]
    assert [chunk.first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_megatron_s_interleaved_example_is_dealt_out_as_megatron_does() -> None:
    """8 layers, 2 stages, 4 chunks (Megatron-LM, `get_transformer_layer_offset`): [0][1] | [2][3] | [4][5] | [6][7]."""
    held = {(chunk.stage, chunk.virtual): chunk.layers for chunk in pipeline(8, 2, 4)}
    assert held[0, 0] == (0,)
    assert held[1, 0] == (1,)
    assert held[0, 1] == (2,)
    assert held[1, 3] == (7,)


@quick
@given(st.integers(1, 12), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_uneven_stages_are_accepted_only_if_they_hold_all_layers(layers: int, sizes: list[int]) -> None:
    if sum(sizes) == layers:
        chunks = pipeline(layers, len(sizes), layer_list=tuple(sizes))
        assert [len(chunk.layers) for chunk in chunks] == sizes
    else:
        with pytest.raises(LayoutError, match="layer_list"):
            pipeline(layers, len(sizes), layer_list=tuple(sizes))


# ---- CRC-32


@quick
@given(st.lists(st.binary(max_size=200), max_size=8))
def test_the_crc_of_a_whole_is_that_of_its_parts_combined(parts: list[bytes]) -> None:
    combined = crc32.combine([(zlib.crc32(part), len(part)) for part in parts])
    assert combined == zlib.crc32(b"".join(parts))


@quick
@given(st.integers(0, 3_000_000))
def test_the_crc_of_zeros_needs_no_zeros(count: int) -> None:
    assert crc32.of_zeros(count) == zlib.crc32(bytes(count))


# ---- safetensors

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return random bits of a type, so also infinities and NaNs."""
    data = np.random.default_rng(seed).integers(0, 256, num_bytes(dtype, shape), dtype=np.uint8)
    raw = torch.from_numpy(data % 2 if dtype == "BOOL" else data)
    return raw.view(TORCH_TYPES[dtype]).reshape(shape) if len(data) else torch.empty(shape, dtype=TORCH_TYPES[dtype])


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


tensors = st.builds(random_tensor, st.sampled_from(sorted(TORCH_TYPES)), shapes, st.integers(0, 2**32))


@quick
@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), tensors, max_size=5),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_safetensors_and_the_reference_library_read_each_other(
    tmp_path: Path, named: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    theirs = tmp_path / "theirs.safetensors"
    save_file(named, theirs, metadata=metadata or None)
    data, header = theirs.read_bytes(), read_header(theirs)
    assert header.metadata == metadata
    assert {name: data[entry.start : entry.end] for name, entry in header.tensors.items()} == {
        name: raw_bytes(tensor) for name, tensor in named.items()
    }
    assert parse_header(header.raw, "again") == header
    types = {torch_type: name for name, torch_type in TORCH_TYPES.items()}
    made = make_header([(name, types[t.dtype], tuple(t.shape)) for name, t in named.items()], metadata)
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(made.raw + b"".join(map(raw_bytes, named.values())))
    loaded = load_file(ours)
    assert {name: (t.dtype, t.shape, raw_bytes(t)) for name, t in loaded.items()} == {
        name: (t.dtype, t.shape, raw_bytes(t)) for name, t in named.items()
    }
    assert made.data_start % 8 == 0


@quick
@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_make_the_safetensors_reader_do_anything_but_refuse(tmp_path: Path, junk: bytes, at: int) -> None:
    header = make_header([("a", "F32", (2, 3)), ("b", "BF16", (4,))], {"format": "pt"})
    whole = header.raw + bytes(32)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[: at % len(whole)] + junk + whole[at % len(whole) + len(junk) :])
    try:
        found = read_header(path)
    except InputError:
        return
    assert found.file_bytes == path.stat().st_size


# ---- pickles

scalars = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=20)
)  # fmt: skip
keys = st.integers() | st.text(max_size=5) | st.booleans() | st.tuples(st.integers(), st.text(max_size=3))
structures = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=25,
)


@quick
@given(structures)
def test_what_we_pickle_python_unpickles(value: Any) -> None:
    loaded = pickle.loads(write_pickle(value))
    assert loaded == value
    assert repr(loaded) == repr(value), "True is not 1 and 1.0 is not 1"


@quick
@given(structures, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_what_python_pickles_we_read(value: Any, protocol: int) -> None:
    assert repr(read_pickle(pickle.dumps(value, protocol), "test")) == repr(value)


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=5), structures, max_size=4))
def test_a_namespace_survives_both_ways(fields: dict[str, Any]) -> None:
    loaded = pickle.loads(write_pickle(Instance(Global("argparse", "Namespace"), fields)))
    assert isinstance(loaded, argparse.Namespace)
    assert repr(vars(loaded)) == repr(fields)
    assert repr(dict(read_pickle(pickle.dumps(argparse.Namespace(**fields), 2), "test"))) == repr(fields)


def test_classes_we_do_not_know_are_read_as_inert_values() -> None:
    found = read_pickle(pickle.dumps({"a": SimpleNamespace(x=1), "b": OrderedDict(c={1, 2})}, 2), "test")
    assert repr(found["a"]) == "<types.SimpleNamespace>"
    assert found["b"] == {"c": {1, 2}}
    # A call is kept as its name and arguments, and not made.
    made = read_pickle(write_pickle([Call(Global("os", "abort"), ())]), "test")
    assert repr(made) == "[<os.abort>]"


@quick
@given(st.binary(max_size=60))
def test_no_bytes_make_the_pickle_reader_do_anything_but_read_or_refuse(junk: bytes) -> None:
    try:
        read_pickle(junk, "test")
    except FerryError:
        return


# ---- torch files


@quick
@given(
    st.dictionaries(st.text(min_size=1, max_size=6), tensors, max_size=5), structures, st.sampled_from(["a", "modèl"])
)
def test_torch_loads_what_we_write_and_zip_finds_it_whole(
    tmp_path: Path, named: dict[str, torch.Tensor], rest: Any, name: str
) -> None:
    types = {torch_type: name for name, torch_type in TORCH_TYPES.items()}
    described = {
        key: Tensor(types[t.dtype], tuple(t.shape), str(number)) for number, (key, t) in enumerate(named.items())
    }
    plan = plan_zip({"model": described, "rest": rest}, name=name)
    path = tmp_path / "ours.pt"
    with open(path, "wb+") as file:
        plan.begin(file.fileno())
        for key, tensor in named.items():
            offset = plan.payload_offset(described[key].key)
            assert offset % 64 == 0
            file.seek(offset)
            file.write(raw_bytes(tensor))
        file.flush()
        plan.finish(file.fileno(), {described[key].key: zlib.crc32(raw_bytes(t)) for key, t in named.items()})
    assert path.stat().st_size == plan.num_bytes
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, mmap=mmap, weights_only=False)
        assert repr(loaded["rest"]) == repr(rest)
        assert {key: (t.dtype, t.shape, raw_bytes(t)) for key, t in loaded["model"].items()} == {
            key: (t.dtype, t.shape, raw_bytes(t)) for key, t in named.items()
        }
    check_crcs(open_torch(path))
    path.unlink()


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=6), tensors, min_size=1, max_size=5))
def test_we_read_what_torch_saves(tmp_path: Path, named: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({"model": named, "args": argparse.Namespace(tp=2, dtype=torch.bfloat16)}, path)
    archive = open_torch(path)
    check_crcs(archive)
    data = path.read_bytes()
    assert archive.structure["args"] == {"tp": 2, "dtype": Global("torch", "bfloat16")}
    for key, tensor in named.items():
        extent = archive.extent(key, archive.structure["model"][key])
        assert TORCH_TYPES[extent.dtype] == tensor.dtype
        assert extent.shape == tuple(tensor.shape)
        assert data[extent.offset : extent.offset + extent.num_bytes] == raw_bytes(tensor)


def test_views_and_parameters_are_read_where_they_lie(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int32).reshape(6, 4)
    path = tmp_path / "views.pt"
    torch.save({"tail": base[2:5], "parameter": torch.nn.Parameter(base.float()), "scalar": torch.tensor(7)}, path)
    archive, data = open_torch(path), path.read_bytes()
    tail = archive.extent("tail", archive.structure["tail"])
    assert data[tail.offset : tail.offset + tail.num_bytes] == raw_bytes(base[2:5])
    assert not tail.whole_member
    parameter = archive.extent("parameter", archive.structure["parameter"])
    assert data[parameter.offset : parameter.offset + parameter.num_bytes] == raw_bytes(base.float())
    assert archive.extent("scalar", archive.structure["scalar"]).shape == ()


def test_a_tensor_that_is_not_row_major_is_refused_and_never_read_as_if_it_were(tmp_path: Path) -> None:
    path = tmp_path / "strided.pt"
    torch.save({"turned": torch.arange(6.0).reshape(2, 3).t()}, path)
    archive = open_torch(path)
    with pytest.raises(InputError, match="row-major"):
        archive.extent("turned", archive.structure["turned"])


@quick
@given(st.integers(0, 10**9))
def test_a_torch_file_cut_anywhere_is_refused(tmp_path: Path, at: int) -> None:
    whole = tmp_path / "whole.pt"
    if not whole.exists():
        torch.save({"a": torch.arange(100.0), "b": torch.ones(3)}, whole)
    data = whole.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: at % len(data)])
    with pytest.raises(InputError):
        open_torch(path)


@pytest.fixture(scope="module")
def past_4_gib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse file with a tensor of more than 4 GiB and one that begins past 4 GiB."""
    path = tmp_path_factory.mktemp("large") / "large.pt"
    size = (1 << 32) + 4096
    plan = plan_zip({"big": Tensor("U8", (size,), "0"), "late": Tensor("I64", (3,), "1")}, name="large")
    late = np.array([1, 2, 3], np.int64).tobytes()
    with open(path, "wb+") as file:
        plan.begin(file.fileno())
        file.seek(plan.payload_offset("0") + size - 1)
        file.write(b"\x07")
        file.seek(plan.payload_offset("1"))
        file.write(late)
        file.flush()
        crc = crc32.combine([(crc32.of_zeros(size - 1), size - 1), (zlib.crc32(b"\x07"), 1)])
        plan.finish(file.fileno(), {"0": crc, "1": zlib.crc32(late)})
    return path


def test_torch_and_zipfile_and_we_find_tensors_past_4_gib(past_4_gib: Path) -> None:
    loaded = torch.load(past_4_gib, mmap=True)
    assert loaded["big"][-1] == 7
    assert loaded["late"].tolist() == [1, 2, 3]
    with zipfile.ZipFile(past_4_gib) as archive:
        assert archive.getinfo("large/data/0").file_size == (1 << 32) + 4096
        assert archive.read("large/version") == b"3\n"
    ours = open_torch(past_4_gib)
    extent = ours.extent("big", ours.structure["big"])
    with open(past_4_gib, "rb") as file:
        file.seek(extent.offset + extent.num_bytes - 1)
        assert file.read(1) == b"\x07"


@pytest.mark.slow
def test_the_crc_of_a_member_past_4_gib_is_right(past_4_gib: Path) -> None:
    with zipfile.ZipFile(past_4_gib) as archive:
        assert archive.testzip() is None


def test_more_members_than_a_plain_zip_can_count_are_loaded(tmp_path: Path) -> None:
    count = 65_600
    plan = plan_zip({str(number): Tensor("U8", (), str(number)) for number in range(count)}, name="many")
    path = tmp_path / "many.pt"
    with open(path, "wb+") as file:
        plan.begin(file.fileno())
        file.seek(plan.payload_offset(str(count - 1)))
        file.write(b"\x05")
        file.flush()
        crcs = dict.fromkeys(map(str, range(count - 1)), zlib.crc32(b"\0"))
        plan.finish(file.fileno(), crcs | {str(count - 1): zlib.crc32(b"\x05")})
    assert torch.load(path, mmap=True)[str(count - 1)] == 5
    assert len(open_torch(path).structure) == count


# ---- families


@pytest.mark.parametrize("name", sorted(families()))
def test_every_role_of_a_family_can_be_formatted_and_found_again(name: str) -> None:
    family = families()[name]
    for where in {**family.weights, **{r: w for group in family.optional.values() for r, w in group.items()}}.values():
        template = where if isinstance(where, str) else where.name
        assert template.format(layer=3, expert=5) != template or "{" not in template


def test_every_dtype_has_the_size_that_torch_gives_it() -> None:
    assert {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in TORCH_TYPES.items()} == ITEM_BYTES
