"""A byte-level tokenizer with V4's control tokens: one token per byte, a few merged words, made in memory."""

from typing import Any

from tokenizers import pre_tokenizers

from api.encoding import markers
from api.tokenizer import Tokenizer

WORDS = ("th", "the", "in", "er", "lo", "ll", "He", "llo", "Hello", "an")
SPECIAL = (markers.BOS, markers.EOS, "<｜▁pad▁｜>")
PLAIN_ADDED = (
    markers.FIM_HOLE,
    markers.FIM_BEGIN,
    markers.FIM_END,
    markers.USER,
    markers.ASSISTANT,
    markers.THINK_OPEN,
    markers.THINK_CLOSE,
    markers.DSML,
    markers.LATEST_REMINDER,
    *markers.TASKS.values(),
)


def spec() -> dict[str, Any]:
    """A tokenizer.json: special ids 0..2, then 256 bytes and the merges, then the other control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    merges = []
    for word in WORDS:
        for cut in range(1, len(word)):
            if word[:cut] in vocab and word[cut:] in vocab and word not in vocab:
                merges.append([word[:cut], word[cut:]])
                vocab[word] = len(vocab)
    added = [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for index, token in enumerate(SPECIAL)
    ]  # fmt: skip
    for token in PLAIN_ADDED:
        added.append(
            {"id": len(vocab), "content": token, "special": False, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
        )  # fmt: skip
        vocab[token] = len(vocab)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges},
    }


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(spec(), "tiny")
