"""Where a long text may be cut so that its pieces tokenise to the same ids as the whole.

BPE never merges across a pre-token, so a cut is exact where the pre-tokenizer would cut anyway, whatever is on either
side. The cuts below hold for the splits of the V4 tokenizer: after a line break (no split continues past one), before
a space between two letters (it starts the next word), and between Chinese punctuation and text.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

_V4_SPLITS: Final = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
_CUT: Final = re.compile(r"\n(?=[!-~一-龥])|[a-z](?= [a-z])|[。，！？；：、](?=[一-龥])")


def can_cut(pre_tokenizer: Any) -> bool:
    """Whether the cuts are exact for a tokenizer.json's `pre_tokenizer`: it splits as V4's does."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or ()
    splits = [step for step in steps if step["type"] == "Split"]
    return (
        [_spelled(step["pattern"].get("Regex", "")) for step in splits] == _V4_SPLITS
        and all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
        and [step for step in steps if step["type"] != "Split"]
        == [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    )


def _spelled(pattern: str) -> str:
    """A pattern with line breaks as escapes: published files write them either way."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def pieces(text: str, min_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at least `min_chars` characters, at the first exact place after that many."""
    start = 0
    while len(text) - start > min_chars:
        found = _CUT.search(text, start + min_chars - 1)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]
