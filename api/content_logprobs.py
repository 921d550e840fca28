"""Log-probabilities of the content alone: one entry for each token whose text the caller sees as content."""

from collections.abc import Sequence

import msgspec

from api.chat_output import ChatOutput
from api.parse_events import ContentDelta, Event
from api.text_output import Piece
from api.tokenizer import Tokenizer
from runtime.requests import TokenLogprobs, Tokens


class ContentLogprobs:
    """A `ChatOutput` whose pieces list content tokens only: not the reasoning, markers, calls, or what ended it.

    Tokens are fed one by one. One that shows no text yet, because it may begin a marker or is part of a character,
    waits and is listed with the text that it turns out to belong to.
    """

    def __init__(self, output: ChatOutput, tokenizer: Tokenizer) -> None:
        self._output = output
        self._eos_id = tokenizer.eos_id
        self._bytes_of = tokenizer.token_bytes
        self._waiting: list[TokenLogprobs] = []

    @property
    def in_reasoning(self) -> bool:
        return self._output.in_reasoning

    plain_words = None
    """Every token is looked at."""

    def took(self, num_tokens: int) -> None:
        """Nothing ever is."""

    def feed(self, tokens: Tokens) -> Piece:
        """The next step. Nothing may be fed after a piece with a finish reason."""
        events: list[Event] = []
        listed: list[TokenLogprobs] = []
        num_reasoning = 0
        for step in _single(tokens):
            was_reasoning = self._output.in_reasoning
            piece = self._output.feed(step)
            num_reasoning += piece.num_reasoning
            if step.logprobs and not was_reasoning and not self._ends(step):
                self._waiting.append(step.logprobs[0])
            listed += self._seen(piece.events)
            _join(events, piece.events)
        return Piece(
            tokens.token_ids,
            listed,
            events=events,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            num_reasoning=num_reasoning,
        )

    def _ends(self, step: Tokens) -> bool:
        """Whether the token is one that ended the choice, which is not text."""
        return step.finish_reason == "stop" and (step.stop_token_id is not None or step.token_ids[-1] == self._eos_id)

    def _seen(self, events: Sequence[Event]) -> list[TokenLogprobs]:
        """The entries that the text of these events belongs to."""
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        if not text:
            if events:
                self._waiting.clear()
            return []
        seen, self._waiting = self._waiting, []
        surplus = sum(len(self._bytes_of(entry.token_id)) for entry in seen) - len(text.encode())
        # Newlines before the content and stray markers leave no text.
        while surplus > 0 and (size := len(self._bytes_of(seen[0].token_id))) <= surplus:
            surplus -= size
            del seen[0]
        return seen


def _single(tokens: Tokens) -> list[Tokens]:
    """A step as steps of one token each."""
    last = len(tokens.token_ids) - 1
    if last <= 0:
        return [tokens]
    return [
        msgspec.structs.replace(
            tokens,
            token_ids=(token_id,),
            logprobs=tokens.logprobs[position : position + 1],
            finish_reason=tokens.finish_reason if position == last else None,
            stop_token_id=tokens.stop_token_id if position == last else None,
        )
        for position, token_id in enumerate(tokens.token_ids)
    ]


def _join(events: list[Event], new: Sequence[Event]) -> None:
    for event in new:
        if events and isinstance(event, ContentDelta) and isinstance(events[-1], ContentDelta):
            events[-1] = ContentDelta(events[-1].text + event.text)
        else:
            events.append(event)
