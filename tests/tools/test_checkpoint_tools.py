"""The commands that make and inspect checkpoints, run as their user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.checkpoint import load_weights
from model.config import ModelConfig
from model.presets import tiny
from model.transformer import Transformer
from tests.model.helpers import Request, pools, step
from tools.inspect_checkpoint import main as inspect_checkpoint
from tools.make_checkpoint import main as make_checkpoint
from tools.tiny_tokenizer import BOS, EOS, MARKERS, MIN_VOCAB_SIZE, PAD, SPECIAL_MARKERS, build_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    command = [
        sys.executable,
        "-m",
        "tools.make_checkpoint",
        "--preset",
        "tiny",
        "--out",
        str(directory),
        "--seed",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "MiB" in done.stdout
    assert done.stderr == ""  # no bar where nobody watches
    return directory


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Tokenizer:
    return Tokenizer.from_file(str(made / "tokenizer.json"))


def test_the_tiny_checkpoint_has_every_feature_and_several_shards(made: Path) -> None:
    assert ModelConfig.load(made) == tiny()
    assert len(list(made.glob("model-*.safetensors"))) > 5
    names = {path.name for path in made.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {tiny().layer_kind(layer) for layer in range(6)} == {"swa", "csa", "hca"}
    assert tiny().num_nextn_predict_layers == 1
    assert 0 < tiny().num_hash_layers < 6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made: Path, tmp_path: Path) -> None:
    assert make_checkpoint(["--preset", "tiny", "--out", str(tmp_path / "same"), "--quiet"]) == 0
    for path in made.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    assert make_checkpoint(["--preset", "tiny", "--out", str(tmp_path / "other"), "--seed", "1", "--quiet"]) == 0
    shard = next(path.name for path in sorted(made.glob("*.safetensors")))
    assert (tmp_path / "other" / shard).read_bytes() != (made / shard).read_bytes()
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "numerics", "formats"),
    [
        (torch.float32, "plain", ("f32", "f32")),
        (torch.float32, "released", ("fp8", "mxfp4")),
        (torch.bfloat16, "released", ("fp8", "fp8")),
    ],
)
def test_greedy_output_is_lively_and_bounded(made: Path, tokenizer: Tokenizer, dtype, numerics, formats) -> None:
    config = ModelConfig.load(made)
    started = time.thread_time()
    model = Transformer(config, dtype=dtype, numerics=numerics)
    load_weights(made, model, progress=False)
    assert time.thread_time() - started < 2
    state, request = pools(config, *formats), Request(0, [3])
    prompt = tokenizer.encode(f"{BOS}<｜User｜>How do tides work?<｜Assistant｜></think>", add_special_tokens=False).ids
    logits, emitted = step(model, state.views, [(request, prompt)], all_logits=False), []
    for _ in range(40):
        assert logits.isfinite().all()
        assert 5 < logits.abs().max() < 50
        emitted.append(int(logits[-1].argmax()))
        logits = step(model, state.views, [(request, [emitted[-1]])])
    assert len(set(emitted)) > 20


def test_special_tokens_have_their_ids_and_flags(made: Path, tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(text) for text in (BOS, EOS, PAD)] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == tiny().vocab_size == 1024
    raw = json.loads((made / "tokenizer.json").read_bytes())
    special = {token["content"] for token in raw["added_tokens"] if token["special"]}
    assert special == {BOS, EOS, PAD, *SPECIAL_MARKERS}
    assert {token["content"] for token in raw["added_tokens"]} == special | set(MARKERS)
    for text in (*MARKERS, *SPECIAL_MARKERS, BOS):
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1
    assert tokenizer.encode("hello").ids == tokenizer.encode("hello", add_special_tokens=False).ids
    ids = tokenizer.encode(f"{BOS}<think>why</think>{EOS}", add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>why</think>"
    config = json.loads((made / "tokenizer_config.json").read_bytes())
    assert config["add_bos_token"] is False


def test_any_text_survives_encoding(tokenizer: Tokenizer) -> None:
    every = "".join(map(chr, [*range(0x250), 0x4E2D, 0x6587, 0xFFFD, 0x1F389, 0x10FFFF])) + "\r\n\t  \n\n a  b"
    for text in (every, *every, "", "don't stop", '{"a": [1, 2]}', "<|not a token|>", "日本語テキスト"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_english_costs_two_to_four_characters_a_token(tokenizer: Tokenizer) -> None:
    text = (
        "Distributed systems are hard because messages can be lost, delayed or repeated, and every process may stop at "
        "any moment. The trick is to decide early who owns what, and for how long."
    )
    assert 2 < len(text) / len(tokenizer.encode(text, add_special_tokens=False).ids) < 4


def test_a_vocabulary_too_small_for_bytes_and_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(MIN_VOCAB_SIZE)):
        build_tokenizer(MIN_VOCAB_SIZE - 1)
    assert build_tokenizer(MIN_VOCAB_SIZE).get_vocab_size() == MIN_VOCAB_SIZE
    (tmp_path / "config.json").write_bytes(tiny(vocab_size=100).to_json())
    out = tmp_path / "out"
    assert make_checkpoint(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 1
    assert not out.exists()


def test_any_configuration_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(tiny(vocab_size=300).to_json())
    out = tmp_path / "out"
    assert (
        make_checkpoint(["--config", str(tmp_path / "config.json"), "--out", str(out), "--max-shard-mib", "100"]) == 0
    )
    assert len(list(out.glob("*.safetensors"))) == 2  # the MTP block has a shard of its own
    assert inspect_checkpoint([str(out), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "2 shards, complete" in printed
    assert "6 layers: 2 csa, 2 hca, 2 swa; 3 route by token; 1 MTP" in printed
    assert "mtp.0.ffn.experts.7.w2.scale" in printed


def test_what_is_wrong_is_said_in_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_checkpoint([str(tmp_path)]) == 1
    assert make_checkpoint(["--config", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 1
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    assert make_checkpoint(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "config.json" in lines[0]
    assert "none.json" in lines[1]
    assert "hidden_size" in lines[2] or "missing required field" in lines[2]
