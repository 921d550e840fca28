"""The router's pure parts: registry, policies, transfers, recovery, bodies, answers' events, usage."""

import itertools
import json

import pytest

from router.answer import WholeEvents
from router.bodies import decode_body, prefill_body
from router.exchange import ConnectFailed, ConnectionBroken, NodeLost, UpstreamTimeout
from router.nodes import NodeInfo, RankInfo, RankLoad, Refused, Role
from router.policies import Question, least_loaded, round_robin, session_affinity
from router.recovery import Facts, Failure, Step, decide
from router.registry import Registry, Release
from router.request import Request
from router.transfers import TransferTable
from router.usage import corrected, corrected_events, usage_of
from runtime.errors import RequestError


class Link:
    def __init__(self) -> None:
        self.released: list[Release] = []
        self.closed: list[str] = []

    def release(self, release: Release) -> None:
        self.released.append(release)

    def close(self, reason: str) -> None:
        self.closed.append(reason)


def info(node_id: str, role: Role = Role.DECODE, ranks: int = 1, **changes) -> NodeInfo:
    values = {
        "node_id": node_id,
        "role": role,
        "url": f"http://{node_id}:1",
        "model_id": "m",
        "ranks": tuple(RankInfo(rank, f"{rank:032x}", f"{node_id}:{rank}") for rank in range(ranks)),
        "format_digest": "f",
        "format_summary": "format f",
    }
    return NodeInfo(**{**values, **changes})


def registry_of(*nodes: NodeInfo) -> Registry:
    registry = Registry()
    for node in nodes:
        registry.join(node, Link(), 0.0)
    return registry


def request(**body) -> Request:
    headers = body.pop("headers", {})
    return Request("/v1/completions", headers, json.dumps(body).encode(), "r", max_choices=64)


# Registry


def test_targets_are_in_one_order_whoever_joined_first():
    names = ["b", "c", "a"]
    for order in itertools.permutations(names):
        registry = registry_of(*(info(name, ranks=2) for name in order))
        assert [target.name for target in registry.targets(Role.DECODE)] == ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1"]


def test_a_draining_a_troubled_and_a_lost_node_are_no_targets():
    registry = registry_of(info("a"), info("b"), info("c"), info("d"))
    registry.drain(registry.get("a"))
    registry.heartbeat(registry.get("b"), [], "hot", 1.0)
    registry.lose(registry.get("c"), "gone")
    assert [target.name for target in registry.targets(Role.DECODE)] == ["d/0"]


def test_losing_a_node_fails_its_calls_once():
    class Call:
        reasons: list[str] = []

        def node_lost(self, reason: str) -> None:
            self.reasons.append(reason)

    registry = registry_of(info("a"))
    node, call = registry.get("a"), Call()
    node.calls.add(call)
    registry.lose(node, "first")
    registry.lose(node, "second")
    assert call.reasons == ["first"]


def test_a_second_join_under_one_id_replaces_the_first_and_its_late_loss_hurts_nobody():
    registry = Registry()
    link = Link()
    first = registry.join(info("a"), link, 0.0)
    second = registry.join(info("a"), Link(), 1.0)
    assert link.closed
    registry.lose(first, "its stream ended")
    assert registry.get("a") is second
    assert registry.targets(Role.DECODE)[0].node is second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_id": "other"}, ["'other'", "'m'"]),
        ({"format_digest": "g", "format_summary": "format g"}, ["format g", "format f"]),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(changes, words):
    registry = registry_of(info("a"))
    with pytest.raises(Refused) as refusal:
        registry.join(info("b", **changes), Link(), 0.0)
    assert all(word in str(refusal.value) for word in words)
    registry.join(info("a", **changes), Link(), 0.0)


def test_a_release_for_a_node_that_is_gone_waits_for_its_return():
    registry = registry_of(info("a"))
    node = registry.get("a")
    registry.lose(node, "gone")
    release = Release("t", node.info.ranks[0], computed=False)
    registry.release(node, release)
    link = Link()
    registry.join(info("a"), link, 1.0)
    assert link.released == [release]


# Policies


def test_round_robin_walks_both_roles_in_lock_step():
    registry = registry_of(*(info(f"{role.value}{n}", role, ranks=4) for role in Role for n in range(2)))
    pairs = [
        tuple(round_robin(registry.targets(role), Question(role, turn)).order for role in Role) for turn in range(16)
    ]
    assert all(prefill == decode for prefill, decode in pairs)
    assert [prefill for prefill, _ in pairs] == [0, 1, 2, 3] * 4


def test_round_robin_over_unequal_sides_uses_every_rank():
    registry = registry_of(info("p", Role.PREFILL, ranks=2), info("d", ranks=3))
    pairs = {
        tuple(round_robin(registry.targets(role), Question(role, turn)).name for role in Role) for turn in range(6)
    }
    assert len(pairs) == 6


def test_least_loaded_prefill_counts_queued_tokens_and_those_just_sent():
    registry = registry_of(info("p", Role.PREFILL, ranks=3))
    node = registry.get("p")
    registry.heartbeat(node, [RankLoad(0, queued_prompt_tokens=10), RankLoad(1), RankLoad(2)], "", 1.0)
    node.targets[1].fresh_tokens = 50
    question = Question(Role.PREFILL, 0)
    assert least_loaded(node.targets, question).order == 2
    node.targets[2].fresh_tokens = 50
    assert least_loaded(node.targets, question).order == 0


def test_least_loaded_decode_looks_at_slots_then_pages():
    registry = registry_of(info("d", ranks=3))
    node = registry.get("d")
    loads = [
        RankLoad(0, pages_total=320, pages_free=300, slots_total=8, slots_free=0, waiting=2),
        RankLoad(1, pages_total=320, pages_free=100, slots_total=8, slots_free=4, running=4),
        RankLoad(2, pages_total=320, pages_free=200, slots_total=8, slots_free=1, running=7),
    ]
    registry.heartbeat(node, loads, "", 1.0)
    assert least_loaded(node.targets, Question(Role.DECODE, 0)).order == 2


def test_least_loaded_spreads_equals():
    registry = registry_of(info("d", ranks=4))
    picks = [least_loaded(registry.targets(Role.DECODE), Question(Role.DECODE, turn)).order for turn in range(4)]
    assert sorted(picks) == [0, 1, 2, 3]


def test_a_session_stays_and_only_the_sessions_of_a_lost_node_move():
    registry = registry_of(*(info(f"d{n}") for n in range(5)))
    before = {}
    for session in map(str, range(200)):
        question = Question(Role.DECODE, 0, session)
        before[session] = session_affinity(registry.targets(Role.DECODE), question).name
    assert len(set(before.values())) == 5
    registry.lose(registry.get("d3"), "gone")
    for session, name in before.items():
        now = session_affinity(registry.targets(Role.DECODE), Question(Role.DECODE, 0, session)).name
        assert now == name or name == "d3/0"


@pytest.mark.parametrize(
    ("body", "session"),
    [
        ({"headers": {"x-session-id": "s"}, "user": "u"}, "s"),
        ({"session_params": {"session_id": "n"}, "user": "u"}, "n"),
        ({"prompt_cache_key": "k", "user": "u"}, "k"),
        ({"user": "u"}, "u"),
        ({"user": 5}, None),
        ({}, None),
    ],
)
def test_what_names_a_session(body, session):
    assert request(**body).session == session


# Transfers


def table_with(*nodes: NodeInfo) -> tuple[Registry, TransferTable]:
    registry = registry_of(*nodes)
    return registry, TransferTable(lambda: 0.0, registry.release)


def test_a_release_tells_each_node_once_and_every_choice():
    registry, table = table_with(info("p", Role.PREFILL), info("d", ranks=2))
    transfer = table.open(1, "r", registry.targets(Role.PREFILL)[0], 2)
    transfer.decodes.extend(registry.targets(Role.DECODE))
    table.release(transfer, "why not")
    for name in "pd":
        ids = [release.transfer_id for release in registry.get(name).link.released]
        assert ids == [f"{transfer.transfer_id}-0", f"{transfer.transfer_id}-1"]
    table.check_integrity(set())


def test_a_transfer_ends_once():
    registry, table = table_with(info("p", Role.PREFILL))
    transfer = table.open(1, "r", registry.targets(Role.PREFILL)[0], 1)
    table.finish(transfer)
    with pytest.raises(AssertionError, match="finished"):
        table.release(transfer, "again")


def test_a_transfer_without_its_request_fails_the_audit_by_name():
    registry, table = table_with(info("p", Role.PREFILL))
    transfer = table.open(7, "r", registry.targets(Role.PREFILL)[0], 1)
    table.check_integrity({7})
    with pytest.raises(AssertionError, match=transfer.transfer_id):
        table.check_integrity(set())


def test_transfer_ids_are_32_hex_digits_and_never_repeat():
    registry, table = table_with(info("p", Role.PREFILL))
    ids = {table.open(1, "r", registry.targets(Role.PREFILL)[0], 1).transfer_id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(bytes.fromhex(transfer_id)) == 16 for transfer_id in ids)


# Recovery


FACTS = {"attempt": 1, "max_attempts": 3, "recompute": True, "state_held": True, "other_decode": True}


@pytest.mark.parametrize(
    ("failure", "changes", "step"),
    [
        (Failure("decode", "d", error=ConnectFailed("x")), {}, Step.OTHER_DECODE),
        (Failure("decode", "d", error=NodeLost("x")), {}, Step.OTHER_DECODE),
        (Failure("decode", "d", status=503), {}, Step.OTHER_DECODE),
        (Failure("decode", "d", status=500), {}, Step.NEW_TRANSFER),
        (Failure("decode", "d", error=NodeLost("x")), {"state_held": False}, Step.NEW_TRANSFER),
        (Failure("decode", "d", error=NodeLost("x")), {"other_decode": False}, Step.NEW_TRANSFER),
        (Failure("prefill", "p", error=ConnectionBroken("x")), {}, Step.NEW_TRANSFER),
        (Failure("prefill", "p", status=503), {}, Step.NEW_TRANSFER),
        (Failure("prefill", "p", error=UpstreamTimeout("x")), {}, Step.GIVE_UP),
        (Failure("prefill", "p", status=500), {"attempt": 3}, Step.GIVE_UP),
        (Failure("prefill", "p", status=500), {"recompute": False}, Step.GIVE_UP),
        (Failure("prefill", "p", error=ConnectFailed("x")), {"recompute": False}, Step.NEW_TRANSFER),
        (Failure("decode", "d", status=503), {"recompute": False}, Step.OTHER_DECODE),
    ],
)
def test_what_follows_a_failure(failure, changes, step):
    assert decide(failure, Facts(**{**FACTS, **changes})) is step


def test_errors_to_clients_name_no_address():
    for failure in (
        Failure("decode", "10.0.0.1/0", error=ConnectFailed("10.0.0.1: refused")),
        Failure("prefill", "10.0.0.1/0", status=500),
        Failure("prefill", "10.0.0.1/0", error=UpstreamTimeout("10.0.0.1")),
        Failure("decode", "10.0.0.1/0", status=503, retry_after="Tue, 1 Jan"),
    ):
        assert "10.0" not in str(failure.as_error())
        assert failure.as_error().status in (502, 503, 504)


# Bodies


@pytest.mark.parametrize("raw", [b"{}", b' {"a":1} \n', b'{"a":{"b":"}"}}', '{"é":"}"}'.encode(), b'{"a":[]}'])
def test_members_are_spliced_into_any_object(raw):
    made = Request("/v1/completions", {}, raw, "r", max_choices=1)
    spliced = b"".join(bytes(piece) for piece in made.with_members({"x": {"y": 1}}))
    assert json.loads(spliced) == {**json.loads(raw), "x": {"y": 1}}


def test_both_legs_name_the_same_transfer_and_min_tokens_goes_along():
    registry, table = table_with(info("p", Role.PREFILL))
    transfer = table.open(1, "r", registry.targets(Role.PREFILL)[0], 1)
    made = request(prompt="x", min_tokens=3, max_tokens=9)
    sent = json.loads(b"".join(bytes(piece) for piece in prefill_body(made, transfer, "tandem")))
    received = json.loads(b"".join(bytes(piece) for piece in decode_body(made, transfer, "tandem")))
    assert sent["kv_transfer_params"]["min_tokens"] == 3
    assert sent["max_tokens"] == received["max_tokens"] == 9
    assert sent["kv_transfer_params"]["transfer_id"] == received["kv_transfer_params"]["transfer_id"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"n": 2}, {"n": 2, "stream": False, "max_tokens": 1, "min_tokens": 1}),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 9, "stream": True, "stream_options": {}},
            {"max_completion_tokens": 1, "stream": False, "max_tokens": 1, "min_tokens": 1},
        ),
        ("/v1/responses", {"max_output_tokens": 9}, {"max_output_tokens": 1, "stream": False}),
        (
            "/inference/v1/generate",
            {"sampling_params": {"max_tokens": 9, "seed": 1}},
            {"sampling_params": {"max_tokens": 1, "min_tokens": 1, "seed": 1}, "stream": False},
        ),
    ],
)
def test_vllms_prefill_leg_asks_for_one_token_in_the_words_of_the_route(path, body, expected):
    registry, table = table_with(info("p", Role.PREFILL, dialect="vllm"))
    transfer = table.open(1, "r", registry.targets(Role.PREFILL)[0], 1)
    made = Request(path, {}, json.dumps(body).encode(), "r", max_choices=8)
    sent = json.loads(b"".join(bytes(piece) for piece in prefill_body(made, transfer, "vllm")))
    del sent["kv_transfer_params"]
    assert sent == expected


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "3"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [[1], [2], [3]]}, 3),
        ({"prompt": []}, 1),
    ],
)
def test_choices_are_counted_as_the_nodes_count_them(body, choices):
    assert request(**body).choices == choices


def test_more_choices_than_allowed_are_refused():
    with pytest.raises(RequestError, match="65 choices"):
        request(n=65)


# Streams and usage


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_only_whole_events_go_out_however_they_come(end):
    data = b"".join(b"data: %d%b" % (number, end) for number in range(5)) + b"data: half"
    for cut in range(len(data)):
        events = WholeEvents()
        out = [events.cut(data[:cut]), events.cut(data[cut:])]
        assert all(part.endswith(end) or not part for part in out)
        assert b"".join(out) + events.rest() == data


def test_an_event_without_end_is_not_kept_for_ever():
    events = WholeEvents()
    assert events.cut(b"x" * 100) == b""
    assert len(events.cut(b"x" * WholeEvents.MAX_TAIL_BYTES)) == WholeEvents.MAX_TAIL_BYTES + 100


def test_usage_is_corrected_and_nothing_else():
    prefill = usage_of(b'{"usage":{"prompt_tokens":5,"completion_tokens":1}}')
    answer = {"text": '"usage":', "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}
    fixed = json.loads(corrected(json.dumps(answer, separators=(",", ":")).encode(), prefill))
    assert fixed == {**answer, "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}
    events = b'data: {"a":1}\n\n: "usage":\n\ndata: [DONE]\n\n'
    assert corrected_events(events, prefill) == events


RESPONSES_USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 9},
    "output_tokens": 2,
    "total_tokens": 11,
}
MESSAGES_USAGE = {"input_tokens": 0, "cache_read_input_tokens": 9, "output_tokens": 2}


@pytest.mark.parametrize(
    ("prefill", "answer", "expected"),
    [
        (
            {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 1},
            {"type": "response.completed", "response": {"id": "r", "usage": RESPONSES_USAGE}},
            {
                "type": "response.completed",
                "response": {
                    "id": "r",
                    "usage": {
                        "input_tokens": 5,
                        "input_tokens_details": {"cached_tokens": 1},
                        "output_tokens": 2,
                        "total_tokens": 7,
                    },
                },
            },
        ),
        (
            {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 1},
            {"type": "message_start", "message": {"usage": MESSAGES_USAGE}},
            {
                "type": "message_start",
                "message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 2}},
            },
        ),
        (
            {"input_tokens": 5, "output_tokens": 1},
            {"content": [], "usage": MESSAGES_USAGE},
            {"content": [], "usage": {"input_tokens": 5, "output_tokens": 2}},
        ),
    ],
)
def test_the_usage_of_every_api_is_corrected(prefill, answer, expected):
    counts = usage_of(json.dumps({"usage": prefill}).encode())
    raw = json.dumps(answer, separators=(",", ":")).encode()
    assert json.loads(corrected(raw, counts)) == expected
    event = b"event: x\ndata: " + raw + b"\n\n"
    assert json.loads(corrected_events(event, counts).split(b"data: ")[1]) == expected


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"usage":null}', b'{"usage":{"prompt_tokens":"5"}}'])
def test_a_reply_without_usage_corrects_nothing(body):
    assert usage_of(body) is None
