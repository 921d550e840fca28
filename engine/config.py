"""The `engine` section of a node's YAML. Names follow vLLM's flags where one exists."""

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's engine. "auto" values are resolved at start, into a new config that the process logs."""

    model: str
    """Checkpoint directory in the released format."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:N", or "auto": the rank's own CUDA device where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activations. auto: float32 on a CPU, bfloat16 on a GPU."""
    numerics: Literal["released", "plain"] = "released"
    """released: quantisation exactly as the released program does it; plain: none."""
    output_projection: Literal["auto", "fp8", "wide"] = "auto"
    """Input of attention's first output projection, which the released program leaves unquantised. fp8: rounded like
    every other projection's, with the weight as stored; wide: in `dtype`. auto: fp8 on a GPU with released numerics."""
    kv_cache_dtype: Literal["auto", "fp8", "bf16", "f32"] = "auto"
    """Row format of the state. auto: fp8 with released numerics, else as wide as `dtype`."""
    index_cache_dtype: Literal["auto", "mxfp4", "fp8", "bf16", "f32"] = "auto"
    """Index-key format of the state. auto: mxfp4 with released numerics, else as wide as `dtype`."""
    block_size: int = 256
    """Tokens a page holds."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: read the checkpoint; dummy: seeded random weights of the config's shapes, for benchmarks."""
    seed: int = 0
    """Of dummy weights. Sampling is seeded per request."""

    max_num_seqs: int = 256
    """Requests that compute or receive at the same time."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step: decode tokens first, the rest for prompts."""
    max_model_len: int | Literal["auto"] = "auto"
    """Prompt and output together. auto: the model's own limit, or what the pages hold if that is less."""
    num_pages: int | Literal["auto"] = "auto"
    """auto: from the memory that is free after loading the weights."""
    gpu_memory_utilization: float = 0.9
    """Part of a GPU's memory this rank may use in all. Ignored on a CPU."""
    kv_cache_memory_bytes: int | None = None
    """Bytes for pages and slots; overrides `gpu_memory_utilization`. On a CPU, None means a quarter of what is free."""

    async_scheduling: Literal["auto", "on", "off"] = "auto"
    """Launch a step before the tokens of the one before it have reached the host. auto: on a GPU."""
    enforce_eager: bool = False
    """Capture no decode steps."""
    cudagraph_capture_sizes: tuple[int, ...] | Literal["auto"] = "auto"
    """Numbers of requests that decode steps are captured for at start; a batch is padded to the next one. auto: some up
    to `max_num_seqs` on a GPU, none on a CPU, where a captured step is an ordinary one on padded inputs."""

    max_queued_requests: int = 1024
    """Requests that wait for room; one more is refused with "overloaded"."""
    max_held_requests: int = 64
    """Prefilled states kept for others to fetch, those being computed included; at the bound, prefills wait."""
    long_prefill_share: float = 0.5
    """Part of a step's prompt tokens that the oldest prompt is sure of; the rest goes to the shortest ones."""
    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    """When a state does not arrive: end the request with an error, or compute its prompt here."""
    max_step_failures: int = 3
    """Failed steps in a row after which the process ends with the last error."""
    stats_interval_s: float = 0.5
    """How often the API process is told the gauges."""

    profiler_dir: str | None = None
    """Where traces go. With it, SIGUSR2 makes an engine process record its next steps."""
    profiler_steps: int = 8
    """Steps of one trace."""
    profiler_ranges: bool = False
    """Name the phases of a step in traces, and in NVTX on a GPU."""

    def __post_init__(self) -> None:
        for name in (
            "profiler_steps",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_queued_requests",
            "max_step_failures",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("max_model_len", "num_pages", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            _require(not isinstance(value, int) or value >= 1, name, value, "must be at least 1")
        _require(self.max_held_requests >= 0, "max_held_requests", self.max_held_requests, "must not be negative")
        for name in ("gpu_memory_utilization", "long_prefill_share"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "must be above 0 and at most 1")
        sizes = self.cudagraph_capture_sizes
        _require(
            sizes == "auto" or all(1 <= size <= self.max_num_seqs for size in sizes),
            "cudagraph_capture_sizes",
            sizes,
            f"must be from 1 to max_num_seqs={self.max_num_seqs}",
        )
        _require(self.stats_interval_s > 0, "stats_interval_s", self.stats_interval_s, "must be positive")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"must be at least max_num_seqs={self.max_num_seqs}: every running request decodes one token a step",
        )

    @property
    def max_step_tokens(self) -> int:
        """The most tokens one forward pass sees: a full decode batch still leaves a page's worth to prompts."""
        return max(self.max_num_batched_tokens, self.max_num_seqs + self.block_size)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}: {rule}")
