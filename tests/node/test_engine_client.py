"""What an API process makes of what its ranks say, and of their end."""

import pytest

from api.backend import EngineInfo
from node.engine_client import NodeEngineClient
from node.engine_link import EngineLink
from runtime.channel import ChannelAddress
from runtime.errors import EngineError, RequestError
from runtime.requests import RankLost, SamplingParams, StepOutput, Submit, ToEngine, Tokens
from runtime.token_ids import TokenIds


class RecordingLink(EngineLink):
    """Keeps what would be sent."""

    def __init__(self, rank: int) -> None:
        super().__init__(ChannelAddress("unused", rank, 2), reader=1)
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)


def client_of(links: list[RecordingLink]) -> NodeEngineClient:
    info = EngineInfo(model_id="m", max_model_len=10, vocab_size=10, role="standalone", num_ranks=len(links), process=1)
    return NodeEngineClient(info, links, lambda _: None, recompute=False)


def submit(request_id: str) -> Submit:
    return Submit(request_id=request_id, prompt_ids=TokenIds((1,)), sampling=SamplingParams(max_tokens=5))


async def test_requests_carry_the_process_that_asks_and_take_the_ranks_in_turn() -> None:
    links = [RecordingLink(rank) for rank in range(2)]
    client = client_of(links)
    streams = [await client.generate(submit(name)) for name in "abcd"]
    assert [stream.rank for stream in streams] == [1, 0, 1, 0]
    assert [[message.reader for message in link.sent if isinstance(message, Submit)] for link in links] == [[1, 1]] * 2


async def test_a_lost_rank_ends_its_requests_and_takes_no_more() -> None:
    links = [RecordingLink(rank) for rank in range(2)]
    client = client_of(links)
    lost, kept = await client.generate(submit("lost"), rank=0), await client.generate(submit("kept"), rank=1)
    links[0].receive(StepOutput((Tokens("lost", (7,)),)))
    links[0].receive(RankLost(0, "engine rank 0 ended with exit code -9"))
    assert [tokens.token_ids for tokens in lost.pending()] == [(7,)]
    with pytest.raises(EngineError, match="request lost: engine rank 0 ended with exit code -9"):
        lost.pending()
    assert client.health() == "engine rank 0 ended with exit code -9"
    with pytest.raises(EngineError, match="exit code -9"):
        await client.generate(submit("next"), rank=0)
    assert client.num_open == 1
    links[1].receive(StepOutput((Tokens("kept", (8,), finish_reason="stop"),)))
    assert [tokens.token_ids for tokens in kept.pending()] == [(8,)]
    assert client.num_open == 0


async def test_a_rank_that_is_not_there_and_an_id_in_use_are_refused() -> None:
    client = client_of([RecordingLink(0)])
    await client.generate(submit("a"))
    with pytest.raises(RequestError, match="rank 3 does not exist"):
        await client.generate(submit("b"), rank=3)
    with pytest.raises(RequestError, match="in use"):
        await client.generate(submit("a"))
