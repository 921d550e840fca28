"""Checkpoints: written, read back bit for bit, read by others, and refused by name when anything is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open

from model.checkpoint import INDEX_NAME, Checkpoint, load_weights
from model.checkpoint_writer import plan_shards, write_checkpoint
from model.config import ModelConfig
from model.inventory import inventory
from model.linear import dequantize
from model.random_weights import random_weight
from model.transformer import Transformer
from runtime.errors import CheckpointError, ConfigError
from tests.model.helpers import Request, pools, run, small_config

SHARD_BYTES = 600_000
SEED = 7


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


@pytest.fixture(scope="module")
def written(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(
        directory, config, lambda spec: random_weight(spec, config, SEED), max_shard_bytes=SHARD_BYTES, progress=False
    )
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, body = read_header(path)
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


def rewrite_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((directory / INDEX_NAME).read_bytes())
    change(index["weight_map"])
    (directory / INDEX_NAME).write_text(json.dumps(index))


def refused(directory: Path, *words: str) -> None:
    """The directory is refused with one message that has all `words`."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    for word in words:
        assert word in str(caught.value)


def test_files_are_the_inventory_in_several_shards(written: Path, config: ModelConfig) -> None:
    specs = {spec.name: spec for spec in inventory(config)}
    index = json.loads((written / INDEX_NAME).read_bytes())
    assert set(index["weight_map"]) == set(specs)
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in specs.values())
    assert len(shards(written)) > 3
    assert not list(written.glob("*.partial"))
    for path in shards(written):
        header, body = read_header(path)
        header.pop("__metadata__")
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(body)
        for name, entry in header.items():
            assert (entry["dtype"], tuple(entry["shape"])) == (specs[name].dtype, specs[name].shape)
            assert index["weight_map"][name] == path.name


def test_mtp_has_the_last_shard_to_itself(written: Path) -> None:
    found = [
        {name.startswith("mtp.") for name in read_header(path)[0] if name != "__metadata__"} for path in shards(written)
    ]
    assert found == [{False}] * (len(found) - 1) + [{True}]


def test_the_reference_reader_sees_the_same_values(written: Path, config: ModelConfig) -> None:
    for path in shards(written):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith((".wq_a.weight", ".attn_sink", ".experts.3.w2.weight", "embed.weight", "tid2eid")):
                    stored = file.get_tensor(name)
                    stem = name.removesuffix(".weight")
                    has_scale = f"{stem}.scale" in file.keys()  # noqa: SIM118
                    values = dequantize(stored, file.get_tensor(f"{stem}.scale") if has_scale else None)
                    spec = next(spec for spec in inventory(config) if spec.name == name)
                    wanted = random_weight(spec, config, SEED)
                    step = {"I8": 0.34, "F8_E4M3": 0.07, "BF16": 0.004}.get(spec.dtype, 0.0)
                    assert ((values.double() - wanted).abs() <= step * wanted.abs().max()).all(), name


@pytest.mark.parametrize("fp8_output", [False, True])
def test_packed_weights_compute_what_dequantised_ones_do(written: Path, config: ModelConfig, fp8_output: bool) -> None:
    tokens = list(range(40))
    logits = []
    for packed in (False, True):
        model = Transformer(config, numerics="released", packed_weights=packed, fp8_output=fp8_output)
        load_weights(written, model, progress=False)
        logits.append(run(model, pools(config, "fp8", "mxfp4").views, Request(0, [1]), tokens, [40]))
    assert torch.equal(*logits)


def test_only_the_given_experts_are_read(copy: Path, config: ModelConfig) -> None:
    class Alone:
        """A rank whose peers are never asked."""

        def send(self, x, experts, weights):
            raise AssertionError("nothing is computed here")

    # Zero bytes stand in for the other experts' weights: reading them would be visible.
    for path in shards(copy):
        header, body = read_header(path)
        blanked = bytearray(body)
        for name, entry in header.items():
            if ".ffn.experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= 3:
                start, end = entry["data_offsets"]
                blanked[start:end] = bytes(end - start)
        path.write_bytes(path.read_bytes()[: -len(body)] + blanked)
    model = Transformer(config, experts=range(1, 3), expert_parallel=Alone())
    load_weights(copy, model, progress=False)
    assert not [
        name
        for name in model.holders()
        if ".experts." in name and ".experts.1." not in name and ".experts.2." not in name
    ]
    for layer in model.layers:
        bank = layer.ffn.bank.weights
        assert bank.w13.shape[0] == bank.w2.shape[0] == 2
        assert bank.w13.count_nonzero() > 0.5 * bank.w13.numel()
        assert bank.w2.count_nonzero() > 0.5 * bank.w2.numel()


def test_two_writes_give_the_same_bytes(written: Path, config: ModelConfig, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, config, lambda spec: random_weight(spec, config, SEED), max_shard_bytes=SHARD_BYTES, progress=False
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written.iterdir())
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_weight_and_its_scale_share_a_shard_whatever_the_size(config: ModelConfig) -> None:
    for shard in plan_shards(config, 1):
        names = {spec.name for spec in shard}
        assert all(name.removesuffix(".scale") + ".weight" in names for name in names if name.endswith(".scale"))


def test_a_scale_may_lie_in_another_shard(copy: Path, written: Path, config: ModelConfig) -> None:
    first, second = shards(copy)[:2]
    name = "layers.0.attn.wq_a.scale"
    header, body = read_header(first)
    start, end = header[name]["data_offsets"]
    data = body[start:end]
    rewrite_header(first, lambda h: h.pop(name))
    other_body = read_header(second)[1]
    entry = {**header[name], "data_offsets": [len(other_body), len(other_body) + len(data)]}
    rewrite_header(second, lambda h: h.update({name: entry}))
    with second.open("ab") as file:
        file.write(data)
    rewrite_index(copy, lambda weight_map: weight_map.update({name: second.name}))
    moved, whole = Transformer(config), Transformer(config)
    load_weights(copy, moved, progress=False)
    load_weights(written, whole, progress=False)
    weights = [model.layers[0].attn.wq_a_wkv.weight for model in (moved, whole)]
    assert weights[0] is not None
    assert weights[1] is not None
    assert torch.equal(weights[0], weights[1])


def test_a_missing_index_is_named(copy: Path) -> None:
    (copy / INDEX_NAME).unlink()
    refused(copy, INDEX_NAME, "No such file")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"metadata": {}}', "\xff"]
)
def test_a_corrupt_index_is_named(copy: Path, text: str) -> None:
    (copy / INDEX_NAME).write_text(text, encoding="latin-1")
    refused(copy, INDEX_NAME)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", 7, None, ""])
def test_an_index_that_leaves_the_directory_is_refused(copy: Path, shard: object) -> None:
    rewrite_index(copy, lambda weight_map: weight_map.update({"norm.weight": shard}))  # type: ignore[dict-item]
    refused(copy, INDEX_NAME, "norm.weight")


def test_a_missing_shard_is_named(copy: Path) -> None:
    shards(copy)[1].unlink()
    refused(copy, shards(copy)[0].name.replace("00001", "00002"))


def test_a_tensor_missing_from_the_index_is_named(copy: Path) -> None:
    rewrite_index(copy, lambda weight_map: weight_map.pop("layers.3.attn.wkv.scale"))
    refused(copy, "lacks", "layers.3.attn.wkv.scale")


def test_a_tensor_missing_from_its_shard_is_named(copy: Path) -> None:
    rewrite_header(shards(copy)[0], lambda header: header.pop("embed.weight"))
    refused(copy, "embed.weight", shards(copy)[0].name)


def test_a_surplus_tensor_is_named(copy: Path) -> None:
    rewrite_index(copy, lambda weight_map: weight_map.update({"mtp.1.norm.weight": weight_map["norm.weight"]}))
    refused(copy, "surplus", "mtp.1.norm.weight")


def test_a_surplus_tensor_in_a_shard_is_named(copy: Path) -> None:
    rewrite_header(shards(copy)[0], lambda header: header.update({"extra": header["embed.weight"]}))
    refused(copy, "surplus", "extra")


def test_many_missing_tensors_are_counted(copy: Path) -> None:
    def drop(weight_map: dict[str, str]) -> None:
        for name in [name for name in weight_map if name.startswith("mtp.")]:
            del weight_map[name]

    rewrite_index(copy, drop)
    refused(copy, "lacks", "tensors: mtp.0.", "more")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_named(copy: Path, kept: int) -> None:
    path = shards(copy)[2]
    path.write_bytes(path.read_bytes()[:kept])
    refused(copy, path.name)


def test_a_header_that_claims_gigabytes_is_refused(copy: Path) -> None:
    path = shards(copy)[0]
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(copy, path.name, "truncated")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [160, 256]},
        {"dtype": "BF16", "shape": [160, -256], "data_offsets": [0, 81920]},
        {"dtype": "BF16", "shape": [160, 256], "data_offsets": [0, 81922]},
        {"dtype": "BF16", "shape": [160, 256], "data_offsets": [81920, 0]},
        {"dtype": 5, "shape": [160, 256], "data_offsets": [0, 81920]},
        None,
    ],
)
def test_an_unreadable_header_entry_is_named(copy: Path, entry: object) -> None:
    rewrite_header(shards(copy)[0], lambda header: header.update({"embed.weight": entry}))
    refused(copy, "embed.weight")


@pytest.mark.parametrize(
    ("shape", "dtype"), [([256, 160], "BF16"), ([160, 128], "F32"), ([40960], "BF16"), ([160, 256], "F16")]
)
def test_a_tensor_of_another_shape_or_dtype_is_named(copy: Path, shape: list[int], dtype: str) -> None:
    rewrite_header(
        shards(copy)[0],
        lambda header: header.update({"embed.weight": {**header["embed.weight"], "shape": shape, "dtype": dtype}}),
    )
    refused(copy, "embed.weight", dtype, "config.json implies BF16 [160, 256]")


def test_nothing_is_loaded_from_a_directory_with_an_error(copy: Path, config: ModelConfig) -> None:
    rewrite_header(shards(copy)[-1], lambda header: header.pop("mtp.0.norm.weight"))
    model = Transformer(config)
    with pytest.raises(CheckpointError, match=r"mtp\.0\.norm\.weight"):
        load_weights(copy, model, progress=False)
    assert not hasattr(model.embed, "value")


def test_a_directory_of_another_configuration_is_refused_by_field(written: Path, config: ModelConfig) -> None:
    other = msgspec.structs.replace(config, swiglu_limit=7.0)
    with pytest.raises(ConfigError, match="swiglu_limit"):
        load_weights(written, Transformer(other), progress=False)
