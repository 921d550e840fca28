"""A byte-level BPE with a few dozen merges and control tokens at ids of its own: nothing may depend on V4's ids."""

from typing import Any

from api.byte_level import ALPHABET
from api.encoding import markers

MERGES = ["t h", "th e", "Ġ the", "i n", "in g", "e r", "a n", "an d", "Ġ and", "o n", "< /", "th in", "thin k", "Ġ Ġ"]
SPECIAL = (markers.BOS, markers.EOS, "<｜▁pad▁｜>")


def small_tokenizer_spec() -> dict[str, Any]:
    tokens = [*sorted(ALPHABET), *(merge.replace(" ", "") for merge in MERGES)]
    vocabulary = {token: 300 + place for place, token in enumerate(tokens)}
    ordinary = (
        markers.THINK_CLOSE, markers.DSML, markers.USER, markers.ASSISTANT, markers.THINK_OPEN, markers.LATEST_REMINDER,
        markers.FIM_BEGIN, markers.FIM_HOLE, markers.FIM_END, *markers.TASKS.values(),
    )  # fmt: skip
    added = [
        {"id": 7 + 11 * place, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": content in SPECIAL}
        for place, content in enumerate((*SPECIAL, *ordinary))
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": MERGES,
        },
    }  # fmt: skip
