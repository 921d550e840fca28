import asyncio
import json
import time

import orjson
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.ascii_words import AsciiWords
from api.chat import render_chat, render_fim
from api.detokenizer import Detokenizer
from api.encoding import markers
from api.encoding.effort import EffortProfile
from api.encoding.segments import PromptBuilder, Segment, prompt_text
from api.text_cuts import can_cut, pieces
from api.tokenizer import PIECE_CHARS, Tokenizer
from runtime.errors import CheckpointError, RequestError
from tests.api.text import vectors
from tests.api.text.small_tokenizer import small_tokenizer_spec

TOKENS = vectors.load("encode-tokens.json")
MARKERS = [*markers.REQUIRED, *markers.TASKS.values(), markers.LATEST_REMINDER, markers.FIM_BEGIN]
hostile_text = st.lists(
    st.one_of(
        st.text(max_size=8), st.sampled_from([*MARKERS, "<｜", "｜DSML", "</thi", "nk>", "\n", "  ", "你好。", "é"])
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def reference(v4_folder):
    """The library's own reading of the whole tokenizer.json."""
    return tokenizers.Tokenizer.from_file(str(v4_folder / "tokenizer.json"))


@pytest.mark.parametrize("vector", TOKENS["vectors"], ids=lambda vector: vector["name"])
def test_token_vectors(v4, vector):
    expected = vector["expected"]
    assert v4.encode(vector["input"]["prompt"]) == expected["token_ids_whole_string"]
    if "tokens" in expected:
        assert [v4.token_text(token_id) for token_id in expected["token_ids_whole_string"]] == expected["tokens"]


def test_control_tokens_are_found_by_their_spelling(v4, small):
    for spelling, token_id in TOKENS["special_token_ids"].items():
        assert v4.token_id(spelling) == token_id
    assert (v4.bos_id, v4.eos_id) == (0, 1)
    assert small.token_id(markers.BOS) == small.bos_id == 7


def test_prompts_of_requests_encode_to_the_ids_of_the_whole_string(v4):
    for vector in vectors.load("encode-requests.json")["vectors"]:
        if "error" not in vector["expected"]:
            segments = render_chat(vectors.chat_request(vector["input"], EffortProfile.PREVIEW)).segments
            assert v4.encode_segments(segments) == v4.encode(prompt_text(segments))


@settings(max_examples=150, deadline=None)
@given(text=hostile_text)
def test_raw_prompts_encode_as_the_library_would(v4, reference, text):
    assert v4.encode(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(text=hostile_text)
def test_plain_text_never_yields_a_control_token(v4, small, text):
    for tokenizer in (v4, small):
        control = {tokenizer.token_id(marker) for marker in MARKERS} | tokenizer.special_ids
        token_ids = tokenizer.encode_plain(text)
        assert control.isdisjoint(token_ids)
        assert tokenizer.decode(token_ids) == text


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(hostile_text, st.sampled_from(MARKERS).map(lambda marker: Segment(marker, True)))))
def test_only_marker_segments_become_control_tokens(v4, parts):
    builder = PromptBuilder()
    for part in parts:
        builder.marker(part.text) if isinstance(part, Segment) else builder.text(part)
    wanted = [v4.token_id(part.text) for part in parts if isinstance(part, Segment)]
    control = {v4.token_id(marker) for marker in MARKERS}
    assert [token_id for token_id in v4.encode_segments(builder.build()) if token_id in control] == wanted


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from(list("ab zA\n\t\r .,-5你好。，ぁ é（\u00a0\u0085\x1f🤔")), max_size=120),
    min_chars=st.integers(1, 20),
)
@example(text="a\n\nb\n- c\n  d\n\n\n", min_chars=1)
def test_pieces_encode_to_the_ids_of_the_whole(reference, text, min_chars):
    cut = list(pieces(text, min_chars))
    assert "".join(cut) == text
    plain = [token_id for piece in cut for token_id in reference.encode(piece, add_special_tokens=False).ids]
    assert plain == reference.encode(text, add_special_tokens=False).ids


def test_only_splits_known_to_be_safe_allow_cuts(v4_folder):
    splits = json.loads((v4_folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    assert can_cut(splits)
    assert not can_cut(None)
    assert not can_cut(small_tokenizer_spec()["pre_tokenizer"])
    assert not can_cut({**splits, "pretokenizers": splits["pretokenizers"][1:]})
    splits["pretokenizers"][-1]["use_regex"] = True
    assert not can_cut(splits)


def test_long_texts_are_cut_and_still_exact(v4, reference):
    text = "\n".join(json.dumps(vector, ensure_ascii=False) for vector in vectors.load("encode-core.json")["vectors"])
    assert len(list(pieces(text, PIECE_CHARS))) > 20
    plain = text.replace("<", "(").replace("｜DSML｜", "")
    assert v4.encode_plain(plain) == v4.encode_plain(plain) == reference.encode(plain, add_special_tokens=False).ids


async def test_long_prompts_are_encoded_off_the_event_loop(v4):
    text = "\n".join(f"{number}: The quick brown fox jumps over the lazy dog." for number in range(40_000))
    segments = (Segment(markers.BOS, True), Segment(text, False))
    lags = []

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - start)

    watcher = asyncio.create_task(watch())
    token_ids = await v4.encode_async(segments)
    watcher.cancel()
    assert v4.decode(token_ids) == text
    assert len(token_ids) > 400_000
    assert len(lags) > 20
    assert sorted(lags)[len(lags) // 2] < 0.02


@pytest.mark.parametrize("unit", [" ", "\n", "a", "1", "你", "。", "-", "a ", " \n", "<think>", "\u00a0", "é"])
def test_long_runs_of_one_thing_encode_in_reasonable_time(v4, unit):
    start = time.perf_counter()
    assert v4.encode_plain(unit * 40_000)
    assert time.perf_counter() - start < 10


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_detokenising_in_any_grouping_equals_decoding_the_whole(v4, reference, data, skip_special):
    control = [v4.token_id(marker) for marker in (markers.EOS, markers.DSML, markers.THINK_CLOSE)]
    known = [*control, *v4.encode_plain("naïve 🤔👍🏽 你好")]
    token_ids = data.draw(st.lists(st.one_of(st.sampled_from(known), st.integers(0, v4.vocab_size - 1)), max_size=30))
    groups = data.draw(st.lists(st.integers(0, 5), min_size=len(token_ids), max_size=len(token_ids)))
    stream = Detokenizer(v4, skip_special=skip_special)
    texts, position = [], 0
    for size in [*groups, len(token_ids)]:
        group = token_ids[position : position + size]
        if stream.is_whole and all(known := [v4.json_of[token_id] for token_id in group]):
            # What needs no decoding: the decoder need not know of it.
            texts.append(orjson.loads(b'"%b"' % b"".join(known)))
        else:
            texts.append(stream.push(group))
        position += size
    whole = "".join(texts) + stream.finish()
    assert whole == v4.decode(token_ids, skip_special=skip_special)
    assert whole == reference.decode(token_ids, skip_special_tokens=skip_special)


def test_a_character_is_never_emitted_in_halves(v4):
    stream = Detokenizer(v4)
    token_ids = v4.encode_plain("😀")
    assert len(token_ids) == 2
    assert [stream.push([token_id]) for token_id in token_ids] == ["", "😀"]


def test_ids_beyond_the_vocabulary_have_no_text(v4):
    assert v4.decode([19923, v4.vocab_size, 10**6]) == "Hello"
    assert v4.token_bytes(v4.vocab_size) == b""
    assert Detokenizer(v4).push([19923, v4.vocab_size]) == "Hello"


def test_lone_surrogates_become_replacement_characters(v4):
    assert v4.decode(v4.encode_plain("a\ud800b")) == "a\ufffdb"


def test_a_missing_optional_token_is_the_requests_problem(tmp_path):
    spec = small_tokenizer_spec()
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != markers.FIM_HOLE]
    with pytest.raises(RequestError, match="fim▁hole"):
        Tokenizer(spec, "small").encode_segments(render_fim("a", "b"))


def test_tokenizers_that_cannot_serve_chats_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    spec = small_tokenizer_spec()
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != markers.DSML]
    with pytest.raises(CheckpointError, match="｜DSML｜"):
        Tokenizer(spec, "small")


def test_remembered_pieces_are_bounded_and_change_nothing(small):
    tokenizer = Tokenizer(small_tokenizer_spec(), "small", cache_chars=64)
    texts = [f"text number {number} and the thing" for number in range(50)]
    assert [tokenizer.encode_plain(text) for text in texts * 2] == [small.encode_plain(text) for text in texts * 2]
    assert tokenizer._cache._num_chars <= 64
    assert tokenizer._cache._num_chars == sum(map(len, tokenizer._cache._ids))


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.text(alphabet=st.characters(max_codepoint=127), max_size=6),
            st.sampled_from(["  ", "\n\n", " \r\n", "1234567", "a1", "(x", " .", "\t\t", "\v", "\f ", "word"]),
        ),
        max_size=12,
    ).map("".join)
)
@example(text="a  5")
@example(text="\x1f\x1fa \x00")
def test_looked_up_words_have_the_ids_of_the_whole(v4, reference, text):
    assert v4.encode_plain(text) == reference.encode(text, add_special_tokens=False).ids


def test_forgetting_words_changes_nothing(monkeypatch):
    monkeypatch.setattr("api.ascii_words.MAX_WORDS", 20)
    calls = []
    words = AsciiWords(lambda missing: calls.extend(missing) or [[len(word)] for word in missing])
    for number in range(50):
        assert list(words.encode(f"some words and {number} more")) == [4, 6, 4, 1, len(str(number)), 5]
    assert len(words._ids) <= 20
    assert len(calls) < 150
