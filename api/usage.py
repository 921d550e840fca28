"""Token counts of one HTTP request, over all its choices."""

from typing import Any

from runtime.requests import Tokens


class Usage:
    """Counts as they arrive. Prompts are counted once, however many choices answer them.

    `num_prompts` prompts were asked with `choices_per_prompt` choices each, numbered prompt by prompt.
    """

    def __init__(self, num_prompt_tokens: list[int], choices_per_prompt: int = 1) -> None:
        self._prompt_tokens = list(num_prompt_tokens)
        self._cached_tokens = [0] * len(num_prompt_tokens)
        self._choices_per_prompt = choices_per_prompt
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    def prompt_seen(self, choice: int, tokens: Tokens) -> None:
        """What the engine says about the prompt: on a decode node the prefill node counted it."""
        prompt = choice // self._choices_per_prompt
        if tokens.prompt_tokens:
            self._prompt_tokens[prompt] = tokens.prompt_tokens
        if tokens.cached_tokens > self._cached_tokens[prompt]:
            self._cached_tokens[prompt] = tokens.cached_tokens

    def cached_of(self, choice: int) -> int:
        """Prompt tokens of this choice whose state was reused."""
        return self._cached_tokens[choice // self._choices_per_prompt]

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompt_tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached_tokens)

    def openai(self) -> dict[str, Any]:
        """The `usage` object of chat and completions, with the two counts that DeepSeek's clients read."""
        prompt, cached = self.prompt_tokens, self.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }
