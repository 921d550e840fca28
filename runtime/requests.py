"""What crosses between an API process and its engine processes, as typed messages (msgpack on a ZMQ socket).

Text never crosses: the API process encodes, detokenises, parses and searches stop strings; the engine sees token ids.
Directions are in each docstring. Times are seconds; token ids are indices into the checkpoint's vocabulary.
"""

import msgspec

from runtime.histogram import HistogramCounts
from runtime.token_ids import TokenIds


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, already validated and resolved (no None means "server default").

    Randomness is counter based: token t of a request depends on (seed, t, logits) and nothing else, so the result does
    not change when a request is preempted, moved to another rank, or batched with others.
    """

    max_tokens: int
    """Tokens to generate at most, counted from the end of the original prompt."""
    min_tokens: int = 0
    """EOS and stop ids are masked until this many tokens are generated."""
    temperature: float = 1.0
    """0 means greedy: the largest logit, ties to the lowest id."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """63 bits. Chosen at random by the API process (or the router, for both legs) when the caller gave none."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty means all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear: the last id is masked when the others precede it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k >= 0: the sampled token's logprob and the k most likely; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    constraint: bytes | None = None
    """A serialised `api.grammar` specification; the node gives the engine a factory that understands it."""


class SendState(msgspec.Struct, frozen=True, tag="send", kw_only=True):
    """Prefill only: compute the prompt, sample one token, hold the state for whoever claims `transfer_id`."""

    transfer_id: str


class ReceiveState(msgspec.Struct, frozen=True, tag="receive", kw_only=True):
    """Decode: the prompt's state and first token come from another rank."""

    transfer_id: str
    source_address: str
    """host:port of the prefill rank's hand-off service."""
    source_epoch: str
    """The incarnation of that rank the router saw (32 hex digits), empty if unknown."""


class LookUpState(msgspec.Struct, frozen=True, tag="look_up", kw_only=True):
    """Decode, behind a router that names only an engine: the node finds the rank and makes a `ReceiveState` of it."""

    transfer_id: str
    bootstrap_address: str
    """http://host:port of the prefill node's bootstrap table."""
    engine_id: str


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True):
    """API -> engine: a new request."""

    request_id: str
    prompt_ids: TokenIds
    sampling: SamplingParams
    handoff: SendState | ReceiveState | LookUpState | None = None
    """None: prefill and decode here."""
    generated_ids: tuple[int, ...] = ()
    """Tokens already generated elsewhere (a resumed stream): prefilled like the prompt, counted as output."""
    priority: int = 0
    """Lower first; first come first served within one value."""
    reader: int = 0
    """Which API process of the node gets the tokens."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """API -> engine: forget this request and give everything back. Unknown ids are ignored."""

    request_id: str


class ReleaseTransfer(msgspec.Struct, frozen=True, tag="release"):
    """API -> engine: the router gave this transfer up. Ids unknown yet are remembered for a while."""

    transfer_id: str


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """API -> engine: forget every cached prefix."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """API -> engine: finish what is running and what is promised, then report `Drained`."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """API -> engine: stop now."""


ToEngine = Submit | Abort | ReleaseTransfer | ResetPrefixCache | Drain | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities (natural log, after temperature-free softmax of the raw logits) at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 = most likely."""
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class Tokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request in one step, in order. `finish_reason` is set on the last one of a request."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    """"stop" (EOS, stop id or grammar end), "length", "abort"; None while running."""
    stop_token_id: int | None = None
    """The stop id that ended it, None for EOS."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose state was reused (from Ready when the prompt was prefilled elsewhere)."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """Engine -> API: everything one step produced, in one message."""

    outputs: tuple[Tokens, ...]


class RequestFailed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """Engine -> API: this request ends without an answer. Its pages and slot are already given back or quarantined."""

    request_id: str
    kind: str
    """"invalid", "overloaded", "transfer", "internal"."""
    message: str
    tokens_emitted: int = 0


class Handover(msgspec.Struct, frozen=True, tag="handover", kw_only=True):
    """Engine -> API: how one received state came across. Sent with the first token; for metrics and benchmarks."""

    request_id: str
    num_bytes: int
    transfer_s: float
    """From the first read submitted to the last read ended."""
    exposed_s: float
    """The part after prefill's Ready arrived: what the client waits for."""
    wait_s: float
    """From Claim to Ready."""


class TransferStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one rank's transfer agent. Counts are totals since start unless they say what is there now."""

    reads_submitted: int
    reads_done: int
    reads_failed: int
    bytes_received: int
    received: int
    receives_failed: int
    sends_ended: dict[str, int]
    """By outcome: "fetched", "released", "expired", "failed"."""
    claims_refused: int
    leases_lapsed: int
    recreations: int
    """How often the transfer engine was re-created."""
    sending: int
    """Transfers opened for sending and not ended, now."""
    receiving: int
    """Receives under way, quarantined ones included, now."""
    reads_in_flight: int
    oldest_read_s: float
    """Age of the oldest unfinished read, now."""
    quarantined_pages: int
    quarantined_s: float
    """Age of the oldest quarantine, now."""
    peers: int
    """Open streams in both directions, now."""


class EngineStats(msgspec.Struct, frozen=True, tag="stats", kw_only=True):
    """Engine -> API: a snapshot, about twice a second and after each change of state."""

    rank: int
    running: int = 0
    waiting: int = 0
    receiving: int = 0
    held: int = 0
    """Finished prefills whose state waits to be fetched."""
    queued_prompt_tokens: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_quarantined: int = 0
    slots_total: int = 0
    slots_free: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    transfers_sent: int = 0
    transfers_received: int = 0
    transfers_failed: int = 0
    recomputed: int = 0
    bytes_received: int = 0
    tokens_asked_for: int = 0
    """Prompt tokens of the requests whose state was to come from another rank."""
    tokens_received: int = 0
    """Those of them whose state came."""
    queue_time: HistogramCounts = HistogramCounts()
    """Per request, with `REQUEST_SECONDS`: until its turn, to its first token, and in all from its turn on."""
    prefill_time: HistogramCounts = HistogramCounts()
    inference_time: HistogramCounts = HistogramCounts()
    step_tokens: HistogramCounts = HistogramCounts()
    """Tokens computed per step, with `STEP_TOKENS`."""
    draining: bool = False
    transfer: TransferStats | None = None
    """None where the rank takes part in no transfers."""


class ExpertLoad(msgspec.Struct, frozen=True, tag="expert_load"):
    """Engine -> API, now and then: how many tokens of this rank chose which expert, since the start."""

    rank: int
    num_layers: int
    counts: bytes
    """int64 in the machine's byte order, [layers, experts]."""


class EngineReady(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """Engine -> API, once: the rank can take work."""

    rank: int
    epoch: str
    """128 random bits in hex; new for every process start and every re-creation of the transfer engine."""
    handoff_address: str
    """host:port of this rank's hand-off service, empty when it takes part in no transfers."""
    format_digest: str
    format_summary: str
    """One line for people: what a mismatch message shows."""
    max_model_len: int
    num_pages: int
    num_slots: int


class EpochChanged(msgspec.Struct, frozen=True, tag="epoch"):
    """Engine -> API: the transfer engine was re-created; peers must use the new epoch."""

    rank: int
    epoch: str
    handoff_address: str


class RankLost(msgspec.Struct, frozen=True, tag="lost"):
    """Node process -> API process, in the place of a rank that ended: nothing more will come from it."""

    rank: int
    reason: str


class GroupDrains(msgspec.Struct, frozen=True, tag="group_drains"):
    """Engine -> API: a rank of another node that steps together with this one was asked to finish, so all must."""

    rank: int


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """Engine -> API: nothing is running and nothing promised is left."""

    rank: int


FromEngine = (
    StepOutput
    | RequestFailed
    | Handover
    | EngineStats
    | ExpertLoad
    | EngineReady
    | EpochChanged
    | RankLost
    | GroupDrains
    | Drained
)
