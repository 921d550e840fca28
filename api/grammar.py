"""A constraint on a model's output: what it is, and the check that it can be enforced before any work is done.

The engine process gets a `Constraint` as bytes and makes its own matcher of it (`api.grammar_matcher`).
"""

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec
from llguidance import LLMatcher, LLParserLimits

from api.grammar_formats import first_line
from api.grammar_tokens import grammar_tokenizer
from api.tokenizer import Tokenizer
from runtime.errors import Overloaded, RequestError

CHECK_TIMEOUT_S: Final = 10.0
"""A grammar that is not compiled by then is refused. Includes the wait for other requests' grammars."""
REMEMBERED: Final = 256

_encoder = msgspec.msgpack.Encoder()


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`grammar` is llguidance's JSON form and describes the answer, from its first token to its end.

    Empty: the answer is free, and only `thinking_budget` binds.
    """

    grammar: str = ""
    after_reasoning: bool = False
    """The output begins inside the reasoning, which is free; the grammar binds from `</think>` on."""
    only_calls: bool = False
    """Prose is free too; the grammar binds from the first tool tag on."""
    allows_calls: bool = False
    """The grammar knows tool calls, so a tool tag inside the reasoning ends it."""
    prefix: str = ""
    """The beginning of the answer that the prompt already holds."""
    thinking_budget: int | None = None
    """Tokens that the reasoning may have; after them comes `</think>`."""


def encode_constraint(constraint: Constraint) -> bytes:
    return _encoder.encode(constraint)


def parser_limits() -> LLParserLimits:
    """What one grammar may cost at most, in the library's units."""
    return LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=200_000, step_max_items=50_000, max_grammar_size=200_000
    )


class GrammarChecker:
    """Compiles each new grammar once, in a thread, before its request goes to the engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._problems: OrderedDict[bytes, str] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        # The library holds the GIL while it reads the vocabulary: better now than when the first request needs it.
        self._vocabulary = self._thread.submit(grammar_tokenizer, tokenizer)

    async def check(self, constraint: Constraint, param: str) -> bytes:
        """The constraint as the engine takes it.

        Raises RequestError, naming `param`, if it cannot be enforced, and Overloaded when too many others wait.
        """
        key = hashlib.sha256(f"{constraint.prefix}\0{constraint.grammar}".encode(errors="surrogatepass")).digest()
        problem = self._problems.get(key)
        if problem is None:
            problem = await self._compile(key, constraint)
        else:
            self._problems.move_to_end(key)
        if problem:
            raise RequestError(f"{param}: cannot be enforced: {problem}", param=param)
        return encode_constraint(constraint)

    def close(self) -> None:
        """End the compiling thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _compile(self, key: bytes, constraint: Constraint) -> str:
        """What is wrong with a grammar; empty when nothing is."""
        job = self._thread.submit(self._problem, key, constraint)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                problem = await asyncio.wrap_future(job)
        except TimeoutError:
            if not job.running():
                raise Overloaded(f"grammars wait longer than {CHECK_TIMEOUT_S:g} s to be compiled") from None
            return f"did not compile within {CHECK_TIMEOUT_S:g} s"
        self._problems[key] = problem
        if len(self._problems) > REMEMBERED:
            self._problems.popitem(last=False)
        return problem

    def _problem(self, key: bytes, constraint: Constraint) -> str:
        known = self._problems.get(key)
        if known is not None:
            return known  # compiled while this one waited for its turn
        matcher = LLMatcher(self._vocabulary.result(), constraint.grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error() and constraint.prefix:
            matcher.consume_tokens(self._tokenizer.encode_plain(constraint.prefix))
            if matcher.is_error():
                return "the message to continue does not follow it"
        return first_line(matcher.get_error())
