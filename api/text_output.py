"""One choice's tokens to text: detokenised as they come, cut at the first stop string."""

from collections.abc import Sequence

import msgspec

from api.detokenizer import Detokenizer
from api.parse_events import Event
from api.stop import StopMatcher
from api.tokenizer import Tokenizer
from runtime.requests import TokenLogprobs, Tokens


class TextRules(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of a request become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    """Keep the stop string, or the text of the stop token, in the output."""
    min_tokens: int = 0
    """Stop strings are not searched in the text of the first ones."""
    skip_special: bool = True


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one step added. The ids count even when their text is held back or cut off."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    text: str = ""
    """A completion's text."""
    events: Sequence[Event] = ()
    """A chat's reasoning, content and tool calls."""
    finish_reason: str | None = None
    """Set once, on the last piece."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None for EOS and for length."""
    num_reasoning: int = 0
    """How many of the tokens were spent on reasoning."""
    num_hidden: int = 0
    """How many leading tokens the caller must not see."""

    @property
    def stopped_early(self) -> bool:
        """A stop string ended it: the engine does not know yet."""
        return isinstance(self.stop_reason, str)


def visible_ids(tokens: Tokens, eos_id: int, rules: TextRules) -> Sequence[int]:
    """The ids that are text: the token that ended a choice is counted, but not shown."""
    ids = tokens.token_ids
    if tokens.finish_reason != "stop" or not ids or rules.include_stop:
        return ids
    return ids[:-1] if tokens.stop_token_id is not None or ids[-1] == eos_id else ids


class TextOutput:
    """A completion's state between steps."""

    __slots__ = ("_detokenizer", "_eos_id", "_json_of", "_matcher", "_num_tokens", "_rules")

    def __init__(self, tokenizer: Tokenizer, rules: TextRules) -> None:
        self._rules = rules
        self._eos_id = tokenizer.eos_id
        self._json_of = tokenizer.json_of
        self._detokenizer = Detokenizer(tokenizer, skip_special=rules.skip_special)
        self._matcher = StopMatcher(rules.stops, include_stop=rules.include_stop) if rules.stops else None
        self._num_tokens = 0

    in_reasoning = False

    @property
    def plain_words(self) -> Sequence[bytes] | None:
        """id -> JSON text of the tokens that would now be more text and nothing else, empty for others; None: none."""
        return self._json_of if self._matcher is None and self._detokenizer.is_whole else None

    def took(self, num_tokens: int) -> None:
        """That many tokens were taken as `plain_words` has them, and not fed: nothing here depends on them."""

    def feed(self, tokens: Tokens) -> Piece:
        """The next step. Nothing may be fed after a piece with a finish reason."""
        visible = visible_ids(tokens, self._eos_id, self._rules)
        if self._matcher is not None:
            return self._feed_searching(tokens, visible, self._matcher)
        text = self._detokenizer.push(visible)
        if tokens.finish_reason is not None:
            text += self._detokenizer.finish()
        return _whole_step(tokens, text)

    def _feed_searching(self, tokens: Tokens, visible: Sequence[int], matcher: StopMatcher) -> Piece:
        text = ""
        for position, token_id in enumerate(visible, start=1):
            self._num_tokens += 1
            piece = self._detokenizer.push((token_id,))
            if self._num_tokens <= self._rules.min_tokens:
                text += piece
                continue
            text += matcher.push(piece).text
            if matcher.stopped_by is not None:
                ids, logprobs = tokens.token_ids[:position], tokens.logprobs[:position]
                return Piece(ids, logprobs, text, finish_reason="stop", stop_reason=matcher.stopped_by)
        if tokens.finish_reason is None:
            return _whole_step(tokens, text)
        text += matcher.push(self._detokenizer.finish()).text
        if matcher.stopped_by is not None:
            return Piece(tokens.token_ids, tokens.logprobs, text, finish_reason="stop", stop_reason=matcher.stopped_by)
        return _whole_step(tokens, text + matcher.finish())


def _whole_step(tokens: Tokens, text: str) -> Piece:
    return Piece(
        tokens.token_ids,
        tokens.logprobs,
        text,
        finish_reason=tokens.finish_reason,
        stop_reason=tokens.stop_token_id,
    )
