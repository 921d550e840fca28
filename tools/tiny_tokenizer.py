"""A small byte-level BPE tokenizer with V4's special tokens, trained on the text below; any bytes can be encoded.

Ids: begin 0, end 1, pad 2, then 256 byte symbols and merges, then the markers. As in the released tokenizer only begin,
end, pad and end-of-query are `special` (left out of decoded text on request); role, thinking and task markers are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_MARKERS = ("<｜end_of_query｜>",)
MARKERS = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>",
    "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜extracted_url｜>", "<｜read_url｜>",
)  # fmt: skip
_BYTES_AND_ENDS = 256 + 3
MIN_VOCAB_SIZE = _BYTES_AND_ENDS + len(MARKERS) + len(SPECIAL_MARKERS)

TEXT = """\
A railway signal box is a small building beside the line from which a signaller controls the points and the signals.
Each lever in the frame moves one thing, and the locking underneath makes sure that no two levers can ever be pulled
in an order that would send two trains onto the same stretch of track. When a train is offered by the next box, the
signaller checks that the section is clear, accepts it, and only then may the signal be cleared. The bell codes are
short: one beat to call attention, two for a train entering the section, three pause one for a stopping train. The
rules were written after accidents, one by one, and every rule has a story behind it that people still remember.

The user asks a question and the assistant answers it. What is the capital of France? The capital of France is Paris.
How many people live there? About two million people live in the city itself, and more than ten million in the area
around it. Can you explain how the moon causes the tides? The moon pulls on the water that is nearest to it more than
on the earth as a whole, and on the earth more than on the water that is farthest away, so there are two bulges, and
as the earth turns each coast passes through both of them every day. That is why there are two high tides and two low
tides. Write a short poem about the sea. The sea is wide, the sea is deep, it sings the little boats to sleep; the
wind may blow, the rain may fall, the morning light will find them all. Thank you! You are welcome.

Let me think about this step by step. First we need to find the number of apples in each basket. There are three
baskets with twelve apples each, so there are thirty-six apples. If we give away ten of them, we have twenty-six left.
Then we divide twenty-six by two, which gives thirteen. Therefore the answer is 13. Wait, we should check whether the
first basket was counted twice. It was not, so the result stands. However, if the question had asked about the other
children, the answer would have been different, because some of them had already eaten theirs before we started.

def read_lines(path):
    \"\"\"Return the lines of a file without their endings.\"\"\"
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\\n") for line in file]

class Counter:
    def __init__(self, start=0):
        self.value = start

    def increment(self, by=1):
        self.value += by
        return self.value

for index, value in enumerate(values):
    if value is None or value == 0:
        continue
    total = total + value
print(f"the total is {total}")

{"name": "get_weather", "arguments": {"city": "London", "unit": "celsius"}, "type": "function", "id": 12345}
{"role": "user", "content": "What is the weather like today?"}, {"role": "assistant", "content": "It is raining."}

The system should return an error message when the request is not valid, and it must not do any work before that. A
server that has been asked to stop finishes what it has promised and takes nothing new. If another process has gone
away while its memory was being read, what was read is thrown away. Every page that was taken is given back, whatever
happens, and at the end the count must be the same as it was at the start. Tests show what happens when things go wrong.

On Monday morning the old clockmaker opened his shop as he had done for forty years, and found that every clock in the
window had stopped at the same minute. He looked at them for a long time. Some had been going since before he was born,
and none of them had ever been stopped by anyone but himself. Perhaps it was the cold, he thought; it had been a hard
winter, and even the river under the bridge was frozen. He took down the largest one, opened the case with a little key
that he always carried with him, and began to work. By noon there was snow on the roofs, and the first clock was running
again. Before the evening came he had mended seven, and by the end of the week there was not a silent clock in the shop.

Water boils at one hundred degrees at sea level, but on a high mountain it boils sooner, because the air presses on it
less. Bread needs flour, water, salt, yeast and time. Good soil holds water and air together, and earthworms make it so.
Light travels about three hundred thousand kilometres in one second; the light of the sun takes eight minutes to reach
us, and that of the nearest other star more than four years. The heart of an adult beats some seventy times a minute.
"""


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids at most; the same text gives the same one on every machine."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: bytes and markers alone take {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS) - len(SPECIAL_MARKERS),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_MARKERS])
    return tokenizer


def write_tokenizer(directory: Path, vocab_size: int, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
    build_tokenizer(vocab_size).save(str(directory / "tokenizer.json"))

    def token(text: str) -> dict[str, Any]:
        return {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False}  # fmt: skip

    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": token(BOS),
            "clean_up_tokenization_spaces": False,
            "eos_token": token(EOS),
            "model_max_length": max_length,
            "pad_token": token(PAD),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 0, "do_sample": True, "eos_token_id": 1, "temperature": 1.0, "top_p": 1.0},
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
