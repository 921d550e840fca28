"""The `api` section of a node's YAML: what the HTTP surface may be told."""

from typing import Literal

import msgspec


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits, names and defaults of the HTTP surface. Names follow vLLM's flags where one exists."""

    served_model_name: tuple[str, ...] = ()
    """Names a request may use; the first one is reported. Empty: the model's own id."""

    api_keys: tuple[str, ...] = ()
    """Accepted keys, plain or as `sha256:<64 hex digits>`. Empty here and in the file: no key is asked for."""
    api_keys_file: str | None = None
    """One key a line, in the same two forms; `#` begins a comment."""

    cors_allow_origins: tuple[str, ...] = ()
    """Origins a browser page may call from; `*` means any. Empty: no CORS headers."""

    max_body_bytes: int = 32 * 2**20
    """Larger request bodies are refused with 413."""
    max_concurrent_requests: int = 1024
    """HTTP requests that generate at one time; more are refused with 503 and Retry-After."""
    keepalive_s: float = 15.0
    """A stream that is silent this long sends an SSE comment, so that proxies keep it open. The response headers wait
    no longer than this for the first token, so that what fails before it still gets its own HTTP status."""

    default_thinking: bool = True
    """Whether a chat request that says nothing about it is answered with reasoning."""
    reasoning_effort_profile: Literal["auto", "preview", "0731"] = "auto"
    """Which table of effort texts the checkpoint was trained on; auto looks into the checkpoint."""
    reasoning_fields: tuple[Literal["reasoning", "reasoning_content"], ...] = ("reasoning", "reasoning_content")
    """The names under which chat messages carry the reasoning."""
    think_max_context: int = 393_216
    """The context Think Max asks for. Below it such requests get a warning header, or 400 under `refuse`."""
    think_max_policy: Literal["warn", "refuse"] = "warn"

    default_max_tokens: int | None = None
    """Tokens a chat request may generate when it names no bound. None: all the context that is left."""
    max_logprobs: int = 20
    """Largest `top_logprobs`, `logprobs` and `prompt_logprobs` of a request; -1 allows the whole vocabulary."""
    max_choices: int = 128
    """Largest `n` times number of prompts in one request."""
    max_stop_strings: int = 64

    response_store_entries: int = 1024
    """Responses kept for `previous_response_id`; the oldest are forgotten first. 0: none are."""
    response_store_bytes: int = 64 * 2**20

    enable_admin: bool = False
    """Serve /abort_requests, /reset_prefix_cache and /server_info."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_concurrent_requests", "max_choices", "max_stop_strings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.keepalive_s > 0:
            raise ValueError(f"keepalive_s={self.keepalive_s}: must be greater than 0")
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise ValueError(f"default_max_tokens={self.default_max_tokens}: must be at least 1")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs}: must be -1 or more")
        if self.response_store_entries < 0 or self.response_store_bytes < 0:
            raise ValueError("response_store_entries and response_store_bytes must not be negative")
        if not self.reasoning_fields:
            raise ValueError("reasoning_fields is empty: reasoning would have no name to go under")
