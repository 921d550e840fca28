"""The checkpoint's tokenizer: text and prompt segments to ids, ids to bytes and text.

Only the plain byte-level BPE is given to the `tokenizers` library. Control tokens (the "added tokens" of
tokenizer.json) are matched here, where it is decided whether a text may contain any: a segment's plain text never can.
"""

import asyncio
import json
import re
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import orjson
import tokenizers

from api.ascii_words import AsciiWords
from api.byte_level import bytes_table
from api.encoding import markers
from api.encoding.segments import Segment, Segments
from api.text_cuts import can_cut, pieces
from runtime.errors import CheckpointError, RequestError
from runtime.token_ids import TokenIds

PIECE_CHARS: Final = 4096
"""Longer texts are encoded in pieces of about this size, side by side, so that no thread keeps the GIL for long."""
PIECES_PER_CALL: Final = 16
"""Pieces that one call of the library spreads over the cores; texts that need more calls use one core at a time."""
CHARS_PER_TURN: Final = 8 * 1024
"""ASCII text that is looked up, in about a millisecond, before a thread steps aside for others."""
SHORT_CHARS: Final = 48 * 1024
"""Text that is looked up in one go: it takes hardly longer than the 5 ms after which a waiting thread gets its turn."""
TURN_S: Final = 1e-4
"""Long enough for a waiting thread to take the GIL, for which it would else wait 5 ms."""
INLINE_CHARS: Final = 512
"""Shorter prompts are encoded on the event loop: handing them to a thread would cost more than they do."""
CACHE_CHARS: Final = 4 * 2**20
"""Text whose ids are remembered: histories and tool schemas come back with every turn of a conversation."""


class Tokenizer:
    """Immutable after loading and safe to use from several threads."""

    def __init__(self, spec: dict[str, Any], source: str, *, cache_chars: int = CACHE_CHARS) -> None:
        """`spec` is a decoded tokenizer.json; `source` names it in errors; `cache_chars` of text keep their ids."""
        added = spec["added_tokens"]
        for token in added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise CheckpointError(f"{source}: added token {token['content']!r} asks for trimming or word matching")
        if (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise CheckpointError(f"{source}: not a byte-level BPE tokenizer")
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}, ensure_ascii=False))
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._cuttable = can_cut(spec["pre_tokenizer"]) and not (spec.get("normalizer") or {}).get("normalizers")
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._any_added = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")
        missing = [marker for marker in markers.REQUIRED if marker not in self._added]
        if missing:
            raise CheckpointError(f"{source}: has no token {', '.join(missing)}")
        self.bos_id = self._added[markers.BOS]
        self.eos_id = self._added[markers.EOS]
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        """Ids that decoded text leaves out by default: BOS, EOS, padding and placeholders, but not `<think>`."""
        self.added_ids = frozenset(self._added.values())
        """Ids of all control tokens; plain text never encodes to one."""
        self._vocabulary = self._bpe.get_vocab(with_added_tokens=False) | self._added
        self.bytes_of: list[bytes] = bytes_table(self._vocabulary.items())
        """id -> the bytes it stands for, control tokens as they are spelled."""
        self.visible_bytes_of = list(self.bytes_of)
        """The same without the special tokens, which are empty here."""
        for token_id in self.special_ids:
            self.visible_bytes_of[token_id] = b""
        self.json_of = list(map(_in_json, self.bytes_of))
        """id -> its text inside a JSON string, if that is whole characters; empty for others and for control tokens."""
        for token_id in self.added_ids:
            self.json_of[token_id] = b""
        self.prose_of = [
            b"" if token.endswith((b"\n", b"<")) else text
            for token, text in zip(self.bytes_of, self.json_of, strict=True)
        ]
        """The same without texts after which it is open what their end belongs to: a tool call may follow."""
        self._words = AsciiWords(self._encode_batch)
        self._cache = _PieceCache(cache_chars)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, checkpoint: Path, *, cache_chars: int = CACHE_CHARS) -> Self:
        """Read `tokenizer.json` of a checkpoint folder. Raises CheckpointError."""
        path = Path(checkpoint) / "tokenizer.json"
        try:
            return cls(json.loads(path.read_bytes()), str(path), cache_chars=cache_chars)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        return len(self.bytes_of)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry or control token, by its exact spelling."""
        return self._vocabulary.get(token)

    def id_of(self, marker: str) -> int:
        """The id of a control token. Raises RequestError for an optional one that this tokenizer lacks."""
        try:
            return self._added[marker]
        except KeyError:
            raise RequestError(f"this model's tokenizer has no token {marker}") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id outside the vocabulary."""
        return join_bytes(self.bytes_of, (token_id,))

    def token_text(self, token_id: int) -> str:
        """One token as text; parts of a character come out as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Encode a raw prompt, in which control tokens may be spelled out. Adds no BOS."""
        return self.encode_segments(self._split_added(text))

    def encode_plain(self, text: str) -> list[int]:
        """Encode text that must not become a control token, whatever it spells."""
        return self.encode_segments((Segment(text, False),))

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Encode a rendered prompt. Raises RequestError for an optional control token that this tokenizer lacks."""
        return list(self.encode_ids(segments))

    def encode_ids(self, segments: Iterable[Segment]) -> TokenIds:
        """`encode_segments` for prompts of any length."""
        parts: list[int | str] = []
        for text, is_marker in segments:
            if is_marker:
                parts.append(self.id_of(text))
            elif self._cuttable:
                parts.extend(pieces(text, PIECE_CHARS))
            elif text:
                parts.append(text)
        ids_of = self._encode_pieces({part for part in parts if isinstance(part, str)})
        return TokenIds.joined(part if isinstance(part, int) else ids_of[part] for part in parts)

    async def encode_async(self, segments: Segments) -> TokenIds:
        """`encode_ids` without holding up the event loop."""
        if sum(len(text) for text, _ in segments) <= INLINE_CHARS:
            return self.encode_ids(segments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.encode_ids, segments)

    async def encode_text_async(self, text: str) -> TokenIds:
        """`encode` without holding up the event loop."""
        if len(text) <= INLINE_CHARS:
            return self.encode_ids(self._split_added(text))
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self.encode_ids(self._split_added(text))
        )

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Whole text of a sequence of ids. Ids outside the vocabulary are left out."""
        return join_bytes(self.visible_bytes_of if skip_special else self.bytes_of, token_ids).decode(
            "utf-8", "replace"
        )

    def close(self) -> None:
        """End the encoding threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _split_added(self, text: str) -> list[Segment]:
        segments: list[Segment] = []
        position = 0
        for found in self._any_added.finditer(text):
            if found.start() > position:
                segments.append(Segment(text[position : found.start()], False))
            segments.append(Segment(found.group(), True))
            position = found.end()
        if position < len(text):
            segments.append(Segment(text[position:], False))
        return segments

    def _encode_pieces(self, texts: set[str]) -> "dict[str, array[int]]":
        known = {text: ids for text in texts if (ids := self._cache.get(text)) is not None}
        missing = [text for text in texts if text not in known]
        if self._cuttable:
            num_chars = 0
            is_long = sum(map(len, missing)) > SHORT_CHARS
            for text in filter(AsciiWords.takes, missing):
                if is_long and num_chars > CHARS_PER_TURN:
                    num_chars = 0
                    time.sleep(TURN_S)
                known[text] = self._words.encode(text)
                num_chars += len(text)
        rest = [text for text in missing if text not in known]
        size = PIECES_PER_CALL if len(rest) <= PIECES_PER_CALL else 1
        for start in range(0, len(rest), size):
            batch = rest[start : start + size]
            known.update(zip(batch, map(_as_array, self._encode_batch(batch)), strict=True))
        for text in missing:
            self._cache.put(text, known[text])
        return known

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The batch call is the one that gives the GIL back while it works."""
        encodings = self._bpe.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def join_bytes(bytes_of: list[bytes], token_ids: Iterable[int]) -> bytes:
    """The bytes of a sequence of ids. A model's head may be wider than the vocabulary: such ids have no bytes."""
    token_ids = tuple(token_ids)
    try:
        return b"".join([bytes_of[token_id] for token_id in token_ids])
    except IndexError:
        return b"".join([bytes_of[token_id] for token_id in token_ids if token_id < len(bytes_of)])


def _in_json(token: bytes) -> bytes:
    try:
        return orjson.dumps(token.decode())[1:-1]
    except UnicodeDecodeError:
        return b""


class _PieceCache:
    """Ids of recently encoded pieces, least recently used out first, bounded by characters."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._num_chars = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> "array[int] | None":
        with self._lock:
            ids = self._ids.get(text)
            if ids is not None:
                self._ids.move_to_end(text)
            return ids

    def put(self, text: str, ids: "array[int]") -> None:
        with self._lock:
            if text in self._ids or len(text) > self._max_chars // 4:
                return
            self._ids[text] = ids
            self._num_chars += len(text)
            while self._num_chars > self._max_chars:
                oldest, _ = self._ids.popitem(last=False)
                self._num_chars -= len(oldest)


def _as_array(token_ids: list[int]) -> "array[int]":
    return array("i", token_ids)


def _clean(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
