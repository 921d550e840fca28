"""The grammar library's view of the tokenizer: bytes per token, control tokens apart."""

from llguidance import LLTokenizer, TokenizerWrapper

from api.tokenizer import Tokenizer


class _Vocabulary:
    """The attributes the library asks for. Control tokens are special: no text of a grammar can match one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = tokenizer.bytes_of
        self.special_token_ids = sorted(tokenizer.added_ids)
        self._encode = tokenizer.encode_plain

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def grammar_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """Takes seconds for a vocabulary of 129,280: build it once per process, not on an event loop."""
    return LLTokenizer(
        TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id
    )
