"""What detokenising and parsing an output cost per token.

    python -m benchmarks.parsing [--tokenizer CHECKPOINT]

The output: reasoning, an answer, and a tool call, 1,000 tokens in all, fed as decode steps deliver them (one token at a
time, or four) and as text. CPU time of this process, best of many runs. Limit: 10 ms for 1,000 tokens.
"""

import time

from api.detokenizer import Detokenizer
from api.encoding.markers import DSML
from api.parse import OutputParser
from api.parse_events import ParserStart, StartState
from api.stop import StopMatcher
from api.tokenizer import Tokenizer
from benchmarks.text_workload import best_ms, prose, tokenizer_folder

NUM_TOKENS = 1000
START = ParserStart(StartState.REASONING)
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="write_file">\n'
    f'<{DSML}parameter name="path" string="true">/tmp/a.py</{DSML}parameter>\n'
    f'<{DSML}parameter name="lines" string="false">[1, 2, {{"a": null}}]</{DSML}parameter>\n'
    f'<{DSML}parameter name="text" string="true">'
)


def model_output(tokenizer: Tokenizer) -> list[int]:
    """A third each of reasoning, answer, and a call with a long string argument that is cut by length."""
    call = [*tokenizer.encode(CALL), *tokenizer.encode_plain(prose(3000))]
    spoken = tokenizer.encode_plain(prose(6000))
    close = tokenizer.id_of("</think>")
    third = NUM_TOKENS // 3
    head = [*spoken[:third], close, *spoken[third : 2 * third]]
    return head + call[: NUM_TOKENS - len(head)]


def main() -> None:
    tokenizer = Tokenizer.load(tokenizer_folder())
    token_ids = model_output(tokenizer)
    assert len(token_ids) == NUM_TOKENS
    text = tokenizer.decode(token_ids)
    chunks = [tokenizer.token_text(token_id) for token_id in token_ids]

    def by_tokens(size: int) -> int:
        parser = OutputParser(START, tools=True, tokenizer=tokenizer)
        for position in range(0, NUM_TOKENS, size):
            parser.feed(token_ids[position : position + size])
        parser.finish("length")
        return parser.num_calls

    def by_text() -> None:
        parser = OutputParser(START, tools=True)
        for chunk in chunks:
            parser.feed_text(chunk)
        parser.finish("length")

    def detokenise() -> None:
        stream = Detokenizer(tokenizer)
        for token_id in token_ids:
            stream.push((token_id,))

    def stop_strings() -> None:
        matcher = StopMatcher(["</answer>", "\n\nUser:", "STOP"])
        for chunk in chunks:
            matcher.push(chunk)

    assert by_tokens(1) == 1
    print(f"{NUM_TOKENS:,} tokens, {len(text):,} characters, one tool call   {'best ms':>8} {'us/token':>9}")
    rows = (
        ("parse, token by token", lambda: by_tokens(1)),
        ("parse, 4 tokens a step", lambda: by_tokens(4)),
        ("parse, text chunks", by_text),
        ("detokenise only, token by token", detokenise),
        ("3 stop strings, chunk by chunk", stop_strings),
    )
    for name, run in rows:
        milliseconds = best_ms(run, 100, clock=time.process_time)
        print(f"{name:50} {milliseconds:8.2f} {1e3 * milliseconds / NUM_TOKENS:9.2f}")
    tokenizer.close()


if __name__ == "__main__":
    main()
