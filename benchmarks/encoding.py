"""What encoding and tokenising a chat cost, and what a very long prompt does to everybody else.

    python -m benchmarks.encoding [--tokenizer CHECKPOINT]

Rows: the prompt of an 8,192-token chat with tools as text; its ids when nothing of it was seen before, and when only
the last turn is new; the same text through the `tokenizers` library in one call, as a peer; prompts of 393,216 tokens
encoded off the event loop, with the delay that a task waking every millisecond sees meanwhile, and without it.
Limits: 10 ms for the 8K chat, 20 ms for the p99 delay.
"""

import asyncio
import random
import time

import tokenizers

from api.chat import render_chat
from api.encoding.segments import Segment, prompt_text
from api.tokenizer import Tokenizer
from benchmarks.text_workload import agent_chat, best_ms, prose, tokenizer_folder

CHAT_TOKENS = 8192
LONG_TOKENS = 393_216


async def wake_ups(until: "asyncio.Task[object]") -> list[float]:
    """How late a task that sleeps for a millisecond wakes up, in ms, again and again until another task ends."""
    late = []
    while not until.done():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        late.append(1e3 * (time.perf_counter() - start) - 1)
    return sorted(late)


def chinese(num_chars: int) -> str:
    """Sentences of frequent characters in random order, which merge little: hard work for a BPE."""
    rng = random.Random(0)
    sentence = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    return "".join("".join(rng.choices(sentence, k=rng.randint(4, 24))) + "。" for _ in range(num_chars // 14))


async def long_prompt(tokenizer: Tokenizer, name: str, text: str) -> None:
    text = text[: int(len(text) * LONG_TOKENS / len(tokenizer.encode_plain(text)))]
    segments = (Segment(text, False),)
    idle = await wake_ups(asyncio.create_task(asyncio.sleep(1)))
    start = time.perf_counter()
    encoding = asyncio.create_task(tokenizer.encode_async(segments))
    late = await wake_ups(encoding)
    took = time.perf_counter() - start
    count = len(encoding.result())
    print(f"{count:>9,} tokens of {name} off the loop {1e3 * took:8.1f} ms  {count / took / 1e6:5.2f} M tokens/s")
    for when, delays in (("meanwhile", late), ("idle", idle)):
        p50, p99 = (delays[int(share * len(delays))] for share in (0.5, 0.99))
        print(f"{'':9} wake-up delay {when:9}  p50 {p50:5.2f}  p99 {p99:5.2f}  max {delays[-1]:5.2f} ms")


def main() -> None:
    folder = tokenizer_folder()
    forgetful, tokenizer = Tokenizer.load(folder, cache_chars=0), Tokenizer.load(folder)
    request = agent_chat(tokenizer, CHAT_TOKENS)
    rendered = render_chat(request)
    text, token_ids = prompt_text(rendered.segments), tokenizer.encode_segments(rendered.segments)
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert peer.encode(text, add_special_tokens=False).ids == token_ids

    shown = f"{len(token_ids):>9,} tokens, {len(request.messages)} messages, {len(request.tools)} tools"
    print(f"{shown}\n{'':9} {'step':30} {'best ms':>8}")
    number = iter(range(10**6))

    def next_turn() -> list[int]:
        new = Segment(f"{next(number)} {text[:800]}", False)
        return tokenizer.encode_segments((*rendered.segments, new))

    render_ms = best_ms(lambda: render_chat(request), 50)
    rows = (
        ("render", render_ms),
        ("render + tokenise, all new", best_ms(lambda: forgetful.encode_segments(render_chat(request).segments), 50)),
        ("render + tokenise, last turn new", render_ms + best_ms(next_turn, 50)),
        ("peer: tokenizers, whole string", best_ms(lambda: peer.encode(text, add_special_tokens=False).ids, 50)),
    )
    for name, milliseconds in rows:
        print(f"{'':9} {name:32} {milliseconds:6.2f}")
    asyncio.run(long_prompt(forgetful, "English and code", prose(LONG_TOKENS * 5)))
    asyncio.run(long_prompt(forgetful, "Chinese", chinese(LONG_TOKENS * 2)))
    for loaded in (forgetful, tokenizer):
        loaded.close()


if __name__ == "__main__":
    main()
