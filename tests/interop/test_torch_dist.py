"""torch_dist without torch: megatron-core loads ours at any layout, we read megatron-core's, bit for bit."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

from judge.run import agreement, megatron_logits, megatron_write, transformers_logits  # noqa: E402
from test_judge import MOE, model_directory  # noqa: E402, F401  (a fixture)

from ferry.core.carry import carry  # noqa: E402
from ferry.core.errors import InputError  # noqa: E402
from ferry.core.layout import padded_vocabulary  # noqa: E402
from ferry.core.progress import Reporter  # noqa: E402
from ferry.formats.checkpoint import Draft  # noqa: E402
from ferry.formats.hf import open_hf  # noqa: E402
from ferry.formats.megatron_names import MegatronLayout  # noqa: E402
from ferry.formats.torch_dist import archives, is_torch_dist, open_torch_dist  # noqa: E402
from ferry.formats.torch_dist_write import draft_torch_dist  # noqa: E402
from ferry.formats.torch_zip import check_crcs  # noqa: E402

DENSE = ("llama", "llama-tied", "qwen2", "qwen3")


def digests_of(checkpoint) -> dict[str, str]:
    return carry(checkpoint.specs(), checkpoint.slots, (), reporter=Reporter())


def write_ours(hf_dir: Path, out: Path, divisible_by: int = 1, **layout) -> dict[str, str]:
    source = open_hf(hf_dir)
    padded = padded_vocabulary(source.model.dims.vocab_size, divisible_by, layout.get("tp", 1))
    draft: Draft = draft_torch_dist(
        source, MegatronLayout(padded_vocab=padded, **layout), out, "iter_0000001", divisible_by
    )
    digests = carry(source.specs(), source.slots, draft.files, reporter=Reporter())
    for name, content in {**draft.small, **draft.last}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    return digests


@pytest.mark.parametrize("name", [*DENSE, *MOE])
def test_megatron_loads_ours_at_another_layout(name, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    write_ours(hf_dir, tmp_path, tp=2, pp=2, ep=2 if name in MOE else 1)
    expected = transformers_logits(hf_dir)
    one = megatron_logits(tmp_path, hf_dir, tp=1, pp=1, fmt="torch_dist", divisible_by=2)
    assert agreement(one, expected)[0] == 0.0 if name in DENSE else agreement(one, expected)[0] < 1e-3
    for layout in ({"tp": 4, "pp": 1}, {"tp": 1, "pp": 2, "vpp": 2}):
        difference, top1 = agreement(megatron_logits(tmp_path, hf_dir, **layout, fmt="torch_dist"), expected)
        assert difference < 1e-3
        assert top1 == 1.0


@pytest.mark.parametrize("name", DENSE)
def test_args_and_every_key_that_megatron_asks_for_by_default_are_there(name, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    write_ours(hf_dir, tmp_path, tp=2, pp=1, divisible_by=128)
    logits = megatron_logits(
        tmp_path, hf_dir, tp=2, pp=1, fmt="torch_dist", fields="args", strict="assume_ok_unexpected"
    )
    assert agreement(logits, transformers_logits(hf_dir))[0] < 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"tp": 2, "pp": 2}) for name in DENSE]
    + [(name, {"tp": 2, "pp": 1, "ep": 2}) for name in MOE]
    + [
        ("llama", {"tp": 1, "pp": 2, "vpp": 2, "divisible_by": 128}),
        ("llama", {"tp": 2, "pp": 1, "metadata": {"non_homogeneous_layers": True}}),
        ("llama", {"tp": 2, "pp": 1, "metadata": {"singleton_local_shards": True}}),
        ("mixtral", {"tp": 2, "pp": 1, "ep": 2, "grouped_gemm": True}),
        ("mixtral", {"tp": 2, "pp": 1, "ep": 2, "metadata": {"singleton_local_shards": True}}),
    ],
)
def test_we_read_what_megatron_wrote_bit_for_bit(name, options, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    megatron_write(hf_dir, tmp_path, fmt="torch_dist", **options)
    assert is_torch_dist(tmp_path)
    assert digests_of(open_torch_dist(tmp_path, hf_dir)) == digests_of(open_hf(hf_dir))


@pytest.mark.parametrize("name", [*DENSE, *MOE])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip_is_bit_exact(name, tp, model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory(name)
    ep = 4 if name in MOE else 1
    written = write_ours(hf_dir, tmp_path, tp=tp, pp=4, ep=ep, divisible_by=128, names="te" if tp == 2 else "mcore")
    checkpoint = open_torch_dist(tmp_path)
    assert digests_of(checkpoint) == written == digests_of(open_hf(hf_dir))
    assert checkpoint.layout["tp"] == tp
    for archive in archives(tmp_path):
        check_crcs(archive)


def test_torch_reads_every_chunk_of_ours(model_directory, tmp_path):  # noqa: F811
    from torch.distributed.checkpoint import FileSystemReader

    write_ours(model_directory("qwen3"), tmp_path, tp=2, pp=2)
    metadata = FileSystemReader(tmp_path / "iter_0000001").read_metadata()
    for index, place in metadata.storage_data.items():
        with open(tmp_path / "iter_0000001" / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        found = torch.load(io.BytesIO(data), weights_only=True)
        if index.offset is None:
            assert found == [None]
        else:
            (chunk,) = [
                chunk for chunk in metadata.state_dict_metadata[index.fqn].chunks if chunk.offsets == index.offset
            ]
            assert found.shape == chunk.sizes


def test_a_chunk_that_is_missing_is_refused(model_directory, tmp_path):  # noqa: F811
    hf_dir = model_directory("llama")
    megatron_write(hf_dir, tmp_path, tp=2, pp=1, fmt="torch_dist")
    path = tmp_path / "iter_0000001/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"holes or overlaps: mlp.linear_fc2.weight of layer"):
        open_torch_dist(tmp_path, hf_dir)
