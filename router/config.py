"""What the router's YAML may say. Times are seconds; names follow vllm-router's flags where one exists."""

from typing import Literal
from urllib.parse import urlsplit

import msgspec

from runtime.grpc import TlsConfig

PolicyName = Literal["round_robin", "least_loaded", "session_affinity"]


def _positive(part: msgspec.Struct, section: str, *fields: str) -> None:
    for field in fields:
        value = getattr(part, field)
        if not value > 0:
            raise ValueError(f"{section}.{field}={value}: expected a positive number")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where clients come in."""

    host: str = "127.0.0.1"
    port: int = 30000
    """0 takes any free port; the log says which."""
    max_payload_bytes: int = 64 * 2**20
    """Larger bodies get 413."""
    max_concurrent_requests: int = 32768
    """More get 503 with Retry-After."""
    header_timeout_s: float = 30.0
    """For the whole head of a request, and for each pause within its body."""
    keepalive_s: float = 75.0
    """How long an idle client connection stays open."""
    write_stall_s: float = 300.0
    """A client that reads nothing for this long while there is something to read is given up."""
    cors_allowed_origins: tuple[str, ...] = ("*",)
    drain_s: float = 120.0
    """After SIGTERM running requests may take this long."""
    fast_path: bool = True
    """Serve the hot routes on the connection itself instead of through aiohttp. Off only to measure the difference."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"server.port={self.port}: expected 0..65535")
        _positive(self, "server", "max_payload_bytes", "max_concurrent_requests", "header_timeout_s", "keepalive_s")
        _positive(self, "server", "write_stall_s")


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where nodes come in (gRPC)."""

    host: str = "127.0.0.1"
    port: int | None = 30001
    """None: nodes cannot register and only the static lists count. 0: any free port."""
    heartbeat_s: float = 1.0
    missed_heartbeats: int = 3
    """A node not heard of for this many heartbeats is lost."""
    join_s: float = 5.0
    """How long a new stream may take to say who it is."""
    tls: TlsConfig | None = None
    """Mutual TLS: nodes present a certificate signed by `tls.ca`."""

    def __post_init__(self) -> None:
        _positive(self, "cluster", "heartbeat_s", "missed_heartbeats", "join_s")


class StaticNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that does not register: the router asks it who it is."""

    url: str
    bootstrap_port: int | None = None
    """vLLM prefill nodes: the port of the Mooncake bootstrap server (8998 if not said)."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"url={self.url!r}: expected http://host:port")


class NodesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Static lists, beside the nodes that register."""

    prefill: tuple[StaticNode, ...] = ()
    decode: tuple[StaticNode, ...] = ()
    dialect: Literal["tandem", "vllm"] = "tandem"
    """vllm: real vLLM nodes with the Mooncake connector."""
    intra_node_data_parallel_size: int = 1
    """vLLM nodes only, and only where their /metrics does not tell the number of ranks."""
    poll_s: float = 2.0
    """How often each static node is asked how it is."""
    poll_timeout_s: float = 5.0
    table_age_s: float = 60.0
    """vLLM nodes: the bootstrap table is asked again when it is older than this."""

    def __post_init__(self) -> None:
        _positive(self, "nodes", "intra_node_data_parallel_size", "poll_s", "poll_timeout_s", "table_age_s")


class DispatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request is served."""

    dispatch: Literal["concurrent", "sequential"] | None = None
    """Both legs at once, or decode after prefill. Not said: concurrent, except in front of vLLM nodes."""
    prefill_policy: PolicyName = "round_robin"
    decode_policy: PolicyName = "round_robin"
    max_attempts: int = 3
    """Tries per request, as long as nothing was sent to the client."""
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    """recompute: a transfer that failed is prefilled again, unseen by the client. fail: it is an error at once."""
    local_prefill_fallback: bool = True
    """With no prefill node up, let decode nodes that can prefill do so."""
    retry_backoff_s: float = 0.05
    """Before a second try on the same nodes; doubles with each try."""
    wait_for_node_s: float = 5.0
    """A request that lost its nodes waits this long for one to come up. New requests do not wait: they get 503."""
    suspect_s: float = 1.0
    """A node that did not answer gets no new work for this long while there are others."""
    max_resumes: int = 3
    """How often a stream that breaks in the middle is continued on another decode rank. 0: it ends with an error."""
    max_choices: int = 128
    """Bound on n times the number of prompts in one request."""

    def __post_init__(self) -> None:
        if self.max_resumes < 0:
            raise ValueError(f"requests.max_resumes={self.max_resumes}: expected 0 or more")
        _positive(self, "requests", "max_attempts", "retry_backoff_s", "wait_for_node_s", "suspect_s", "max_choices")


class DeadlineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long each thing may take. There is no limit on a whole request: a stream may run for hours."""

    connect_s: float = 5.0
    prefill_s: float = 600.0
    """From the dispatch of the prefill leg to its answer: queueing plus the prompt."""
    first_byte_s: float = 660.0
    """From the dispatch of the decode leg to the first byte of its answer."""
    idle_gap_s: float = 120.0
    """Between two pieces of a decode node's answer."""
    lost_gap_s: float = 5.0
    """The same, once the node stopped sending heartbeats."""
    state_hold_s: float = 30.0
    """How long after prefill's answer its state may still be claimed by another decode rank. At most the nodes' own."""

    def __post_init__(self) -> None:
        _positive(self, "deadlines", *(field for field in self.__struct_fields__))


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What /health may call healthy."""

    canary: bool = True
    """Send tiny completions of the router's own where traffic gives no proof."""
    canary_interval_s: float = 10.0
    """A pair is probed when nothing passed through the cluster for this long."""
    canary_timeout_s: float = 30.0
    canary_tokens: tuple[int, ...] = (1, 2, 3, 4)
    """The prompt, as token ids."""
    proof_age_s: float = 60.0
    """Proof older than this counts no more."""

    def __post_init__(self) -> None:
        _positive(self, "health", "canary_interval_s", "canary_timeout_s", "proof_age_s")
        if not self.canary_tokens:
            raise ValueError("health.canary_tokens is empty: a prompt has at least one token")


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    nodes: NodesConfig = NodesConfig()
    requests: DispatchConfig = DispatchConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    health: HealthConfig = HealthConfig()
    node_api_key: str | None = None
    """Sent to nodes as a bearer token when the client sent no Authorization header."""
    model: str | None = None
    """Only nodes serving this model may join. Not said: the first node decides."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.cluster.port is None and not self.nodes.prefill and not self.nodes.decode:
            raise ValueError("cluster.port is null and nodes.prefill and nodes.decode are empty: nobody could serve")

    @property
    def concurrent(self) -> bool:
        """Whether both legs go out at once."""
        return (
            self.requests.dispatch or ("sequential" if self.nodes.dialect == "vllm" else "concurrent")
        ) == "concurrent"
