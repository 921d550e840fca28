"""An engine process without a model: every `period_s` each running request gets one token, all in one message.

A token's text is the time at which it was sent, in tenths of a millisecond modulo a second, so that whoever receives
the text knows how long it was on its way (`added_ms`).
"""

import time
from typing import Any

import msgspec
from tokenizers import pre_tokenizers

from api.encoding import markers
from runtime.channel import ChannelAddress, EngineChannel
from runtime.process import ignore_terminal_signals
from runtime.requests import Abort, EngineReady, Shutdown, StepOutput, Submit, Tokens

TICKS_PER_S = 10_000
MAX_MODEL_LEN = 1 << 20


class Pace(msgspec.Struct, frozen=True):
    """How the engine runs: one token per request every `period_s`.

    The token is one of `num_ticks` from `first_time_id` on, by the time of day; with one tick it is always the same.
    """

    period_s: float
    first_time_id: int
    num_ticks: int = TICKS_PER_S


def timing_spec() -> dict[str, Any]:
    """The tokenizer.json: bytes, V4's control tokens, and one token for each tenth of a millisecond of a second."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*markers.REQUIRED, *alphabet))}
    for tick in range(TICKS_PER_S):
        vocab[f"{tick:04d}"] = len(vocab)
    added = [
        {"id": vocab[token], "content": token, "special": token in (markers.BOS, markers.EOS), "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for token in markers.REQUIRED
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def time_id(pace: Pace) -> int:
    """The token that says now."""
    return pace.first_time_id + int(time.monotonic() * TICKS_PER_S) % pace.num_ticks


def added_ms(text: bytes, now: float) -> float:
    """How long ago the token that reads `text` was sent; times beyond a second wrap around."""
    return (now * TICKS_PER_S - int(text)) % TICKS_PER_S * 1000.0 / TICKS_PER_S


def run(address: ChannelAddress, pace: Pace) -> None:
    """The process. Ends when its parent does, or on Shutdown."""
    ignore_terminal_signals()
    channel = EngineChannel(address)
    channel.send(
        EngineReady(
            rank=address.rank,
            epoch="0" * 32,
            handoff_address="",
            format_digest="",
            format_summary="no model",
            max_model_len=MAX_MODEL_LEN,
            num_pages=0,
            num_slots=0,
        )
    )
    left: dict[str, int] = {}
    next_step = time.monotonic()
    while True:
        for message in channel.receive(max(0.0, next_step - time.monotonic()) if left else 60.0):
            if isinstance(message, Submit):
                left[message.request_id] = message.sampling.max_tokens
            elif isinstance(message, Abort):
                left.pop(message.request_id, None)
            elif isinstance(message, Shutdown):
                channel.close()
                return
        now = time.monotonic()
        if not left:
            next_step = now
        elif now >= next_step:
            next_step = max(next_step + pace.period_s, now)
            channel.send(StepOutput(_step(left, time_id(pace))))


def _step(left: dict[str, int], token_id: int) -> tuple[Tokens, ...]:
    outputs = []
    for request_id in list(left):
        left[request_id] -= 1
        finished = not left[request_id]
        if finished:
            del left[request_id]
        outputs.append(Tokens(request_id, (token_id,), finish_reason="length" if finished else None))
    return tuple(outputs)
