"""A request's position in its grammar, in the engine process. The engine calls it between forward passes."""

import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from api.encoding import markers
from api.grammar import Constraint, parser_limits
from api.grammar_formats import first_line
from api.grammar_tokens import grammar_tokenizer
from api.tokenizer import Tokenizer
from runtime.errors import RequestError

COMPILE_TIMEOUT_S: Final = 30.0
"""How long a step may wait for a grammar, the loading of the tokenizer at start-up included."""
REMEMBERED: Final = 64

log = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(Constraint)


class GrammarMatchers:
    """Makes matchers. The tokenizer and new grammars are prepared on a thread of its own, while requests prefill."""

    def __init__(self, checkpoint: Path) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._vocabulary = self._thread.submit(_Vocabulary.load, checkpoint)
        self._compiled: OrderedDict[tuple[str, str], Future[LLMatcher]] = OrderedDict()

    def __call__(self, spec: bytes) -> "GrammarMatcher":
        """A matcher at the beginning of an output. Raises RequestError for bytes that are no Constraint."""
        try:
            constraint = _decoder.decode(spec)
        except msgspec.DecodeError as error:
            raise RequestError(f"not a constraint: {error}") from error
        return GrammarMatcher(constraint, self._vocabulary, self._grammar(constraint) if constraint.grammar else None)

    def _grammar(self, constraint: Constraint) -> "Future[LLMatcher]":
        key = (constraint.grammar, constraint.prefix)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._thread.submit(self._compile, constraint)
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return compiled

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        vocabulary = self._vocabulary.result()
        matcher = LLMatcher(vocabulary.ll, constraint.grammar, log_level=0, limits=parser_limits())
        if constraint.prefix:
            matcher.consume_tokens(vocabulary.tokenizer.encode_plain(constraint.prefix))
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {first_line(matcher.get_error())}")
        return matcher


class _Vocabulary:
    """What matchers need of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ll: LLTokenizer = grammar_tokenizer(tokenizer)
        self.eos_id = tokenizer.eos_id
        self.think_close_id = tokenizer.id_of(markers.THINK_CLOSE)
        self.dsml_id = tokenizer.id_of(markers.DSML)
        self.before_tag = tokenizer.encode_plain("\n\n<")

    @classmethod
    def load(cls, checkpoint: Path) -> "_Vocabulary":
        return cls(Tokenizer.load(checkpoint))


class GrammarMatcher:
    """Free while the output is in a part that the grammar does not bind, then as strict as the grammar."""

    def __init__(
        self, constraint: Constraint, vocabulary: "Future[_Vocabulary]", compiled: "Future[LLMatcher] | None"
    ) -> None:
        """`compiled` is None where the constraint has no grammar."""
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        """Set once the grammar binds."""
        self._in_reasoning = constraint.after_reasoning
        self._num_reasoning = 0
        """Tokens of the reasoning so far."""
        self._last_id = -1
        self.is_done = False
        """Nothing may follow any more."""

    def fill_bitmask(self, row: NDArray[np.int32]) -> None:
        """Set bit t % 32 of word t // 32 for every token t that may come next, clear all others. `row`: contiguous."""
        matcher = self._binding()
        row.fill(0)
        vocabulary = self._vocabulary.result(COMPILE_TIMEOUT_S)
        if self._is_spent:
            _set_bit(row, vocabulary.think_close_id)
            return
        if matcher is None:
            _set_first_bits(row, vocabulary.tokenizer.vocab_size)
            if self._in_reasoning and self._compiled is not None:
                _clear_bit(row, vocabulary.eos_id)  # there would be no answer to bind
            return
        num_bytes = 4 * -(-vocabulary.tokenizer.vocab_size // 32)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, min(num_bytes, row.nbytes))

    def accept(self, token_id: int) -> None:
        """Advance over a token that was allowed. Raises RequestError for one that was not."""
        vocabulary = self._vocabulary.result(COMPILE_TIMEOUT_S)
        matcher = self._binding()
        last_id, self._last_id = self._last_id, token_id
        if self._is_spent and token_id != vocabulary.think_close_id:
            raise RequestError(f"token {token_id} comes after the last of {self._num_reasoning} tokens of reasoning")
        self._num_reasoning += self._in_reasoning
        if matcher is not None:
            if token_id == vocabulary.eos_id and matcher.is_accepting():
                self.is_done = True
            elif not matcher.consume_token(token_id):
                raise RequestError(f"token {token_id} does not follow the grammar: {first_line(matcher.get_error())}")
            else:
                self.is_done = matcher.is_stopped()
        elif self._in_reasoning and token_id == vocabulary.think_close_id:
            self._in_reasoning = False
        elif token_id == vocabulary.dsml_id and self._constraint.allows_calls:
            if vocabulary.tokenizer.token_bytes(last_id).endswith(b"<"):
                self._in_reasoning = False
                if self._compiled is not None:
                    self._matcher = self._compiled.result(COMPILE_TIMEOUT_S).deep_copy()
                    self._matcher.consume_tokens([*vocabulary.before_tag, token_id])
        elif token_id == vocabulary.eos_id:
            self.is_done = True

    @property
    def _is_spent(self) -> bool:
        """Whether the reasoning has used up its budget and has not ended."""
        budget = self._constraint.thinking_budget
        return self._in_reasoning and budget is not None and self._num_reasoning >= budget

    def _binding(self) -> LLMatcher | None:
        """The grammar's state, None while the output is free."""
        if self._compiled is None:
            return None
        if self._matcher is None and not self._in_reasoning and not self._constraint.only_calls:
            self._matcher = self._compiled.result(COMPILE_TIMEOUT_S).deep_copy()
        return self._matcher


def _set_first_bits(row: NDArray[np.int32], count: int) -> None:
    words, bits = divmod(count, 32)
    row[:words] = -1
    if bits and words < len(row):
        row[words] = (1 << bits) - 1


def _set_bit(row: NDArray[np.int32], bit: int) -> None:
    row.view(np.uint32)[bit // 32] |= np.uint32(1 << (bit % 32))


def _clear_bit(row: NDArray[np.int32], bit: int) -> None:
    row.view(np.uint32)[bit // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (bit % 32)))
