"""What an engine process says reaches the API process it concerns, and no other."""

import random

from runtime.replies import Replies
from runtime.requests import (
    Abort,
    Drained,
    EngineStats,
    FromEngine,
    Handover,
    RequestFailed,
    SamplingParams,
    StepOutput,
    Submit,
    Tokens,
)


def submit(request_id: str, reader: int) -> Submit:
    return Submit(request_id=request_id, prompt_ids=(1,), sampling=SamplingParams(max_tokens=9), reader=reader)


def failed(request_id: str) -> RequestFailed:
    return RequestFailed(request_id=request_id, kind="internal", message="m")


def test_a_single_reader_gets_every_message_as_it_is() -> None:
    replies = Replies(1)
    for message in (StepOutput((Tokens("never submitted", (1,)),)), failed("x"), EngineStats(rank=0), Drained(0)):
        assert list(replies.split(message)) == [(0, message)]


def test_stats_go_to_all_and_what_concerns_the_rank_to_the_node_process() -> None:
    replies = Replies(3)
    assert [reader for reader, _ in replies.split(EngineStats(rank=0))] == [0, 1, 2]
    assert list(replies.split(Drained(0))) == [(0, Drained(0))]


def test_every_token_reaches_its_reader_in_order_and_nothing_is_remembered_at_the_end() -> None:
    dice = random.Random(3)
    replies = Replies(3)
    reader_of = {f"r{number}": dice.randrange(3) for number in range(60)}
    waiting, running = list(reader_of), list[str]()
    sent: dict[str, list[int]] = {name: [] for name in reader_of}
    got: dict[str, list[int]] = {name: [] for name in reader_of}
    gone: set[str] = set()

    def deliver(message: FromEngine) -> None:
        for reader, part in replies.split(message):
            if isinstance(part, StepOutput):
                for tokens in part.outputs:
                    assert reader_of[tokens.request_id] == reader
                    got[tokens.request_id] += tokens.token_ids
            else:
                assert isinstance(part, Handover | RequestFailed)
                assert reader_of[part.request_id] == reader
                gone.discard(part.request_id)

    while waiting or running:
        if waiting and dice.random() < 0.5:
            name = waiting.pop()
            replies.asked(submit(name, reader_of[name]))
            running.append(name)
        outputs = []
        for name in list(running):
            kind = dice.choice(["token", "token", "token", "last", "abort", "fail", "handover"])
            if kind in ("token", "last"):
                token = dice.randrange(1000)
                sent[name].append(token)
                outputs.append(Tokens(name, (token,), finish_reason="stop" if kind == "last" else None))
            elif kind == "handover":
                deliver(Handover(request_id=name, num_bytes=1, transfer_s=0.0, exposed_s=0.0, wait_s=0.0))
            elif kind == "fail":
                gone.add(name)
                deliver(failed(name))
            else:
                replies.asked(Abort(name))
                # The engine may have spoken before it heard.
                deliver(StepOutput((Tokens(name, (7,)),)))
                deliver(failed(name))
            if kind in ("last", "abort", "fail"):
                running.remove(name)
        deliver(StepOutput(tuple(outputs)))
    assert got == sent
    assert not gone
    assert replies.num_open == 0
