"""The queue between an engine and one request, and the reading of several through one wake-up."""

import asyncio
from functools import partial

import pytest

from api.backend import TokenQueue, failure
from api.generation import Generation
from api.turn import ROW, Turn
from runtime.errors import EngineError, Overloaded, RequestError, TransferError
from runtime.requests import RequestFailed, Tokens


def tokens(number: int, finish: str | None = None) -> Tokens:
    return Tokens("r", (number,), finish_reason=finish)


async def test_tokens_come_out_in_order_and_once() -> None:
    queue = TokenQueue("r", lambda _: None)
    assert not queue.pending()
    queue.push(tokens(1))
    queue.push(tokens(2))
    assert [t.token_ids for t in queue.pending()] == [(1,), (2,)]
    assert not queue.pending()


async def test_a_failure_is_raised_after_what_came_before_it() -> None:
    queue = TokenQueue("r", lambda _: None)
    queue.push(tokens(1))
    queue.fail(EngineError("x"))
    queue.push(tokens(2))
    assert len(queue.pending()) == 1
    for _ in range(2):
        with pytest.raises(EngineError):
            queue.pending()


async def test_closing_aborts_once_and_only_what_has_not_ended() -> None:
    aborted: list[str] = []
    running, finished, failed = (TokenQueue(name, aborted.append) for name in ("running", "finished", "failed"))
    finished.push(tokens(1, "stop"))
    failed.fail(EngineError("x"))
    for queue in (running, finished, failed):
        queue.close()
        queue.close()
    assert aborted == ["running"]
    running.push(tokens(1))
    assert not running.pending()
    assert running.ended


async def test_a_subscriber_is_woken_at_once_for_what_is_there_already() -> None:
    woken: list[int] = []
    queue = TokenQueue("r", lambda _: None)
    queue.push(tokens(1))
    queue.subscribe(lambda: woken.append(1))
    assert woken == [1]
    queue.push(tokens(2))
    assert woken == [1, 1]


async def test_what_a_direct_reader_takes_is_not_queued_and_what_waits_is_not_overtaken() -> None:
    queue = TokenQueue("r", lambda _: None)
    offered: list[int] = []
    woken: list[int] = []
    takes = True

    def direct(step: Tokens) -> bool:
        offered.append(step.token_ids[0])
        return takes

    queue.push(tokens(0))
    queue.subscribe(lambda: woken.append(1), direct)
    queue.push(tokens(1))
    assert (offered, len(woken)) == ([], 2)
    assert [t.token_ids for t in queue.pending()] == [(0,), (1,)]
    queue.push(tokens(2))
    assert (offered, len(woken)) == ([2], 2)
    assert not queue.pending()
    takes = False
    queue.push(tokens(3))
    takes = True
    queue.push(tokens(4))
    assert (offered, len(woken)) == ([2, 3], 4)
    assert [t.token_ids for t in queue.pending()] == [(3,), (4,)]
    queue.push(tokens(5))
    queue.subscribe(lambda: woken.append(1))
    queue.push(tokens(6))
    assert offered == [2, 3, 5]
    assert [t.token_ids for t in queue.pending()] == [(6,)]


@pytest.mark.parametrize("how", ["finished", "failed", "closed"])
async def test_a_direct_reader_is_offered_nothing_after_the_end(how: str) -> None:
    queue = TokenQueue("r", lambda _: None)
    offered: list[Tokens] = []
    queue.subscribe(lambda: None, lambda step: bool(offered.append(step)))
    if how == "finished":
        queue.push(tokens(1, "stop"))
    elif how == "failed":
        queue.fail(EngineError("x"))
    else:
        queue.close()
    num_offered = len(offered)
    queue.push(tokens(2))
    if how == "finished":
        assert len(queue.pending()) == 1
        queue.push(tokens(3))
    assert len(offered) == num_offered


async def test_a_queue_can_be_iterated_to_its_end() -> None:
    queue = TokenQueue("r", lambda _: None)

    async def write() -> None:
        for number in range(5):
            await asyncio.sleep(0)
            queue.push(tokens(number, "length" if number == 4 else None))

    writing = asyncio.create_task(write())
    assert [t.token_ids[0] async for t in queue] == list(range(5))
    await writing


@pytest.mark.parametrize(
    ("kind", "error"),
    [("invalid", RequestError), ("overloaded", Overloaded), ("transfer", TransferError), ("internal", EngineError)],
)
def test_what_the_engine_reports_becomes_an_error_of_its_kind(kind: str, error: type[Exception]) -> None:
    assert type(failure(RequestFailed(request_id="r", kind=kind, message="m"))) is error


async def test_several_streams_are_read_through_one_wake_up() -> None:
    queues = [TokenQueue(str(number), lambda _: None) for number in range(3)]
    generation = Generation(queues)
    asyncio.get_running_loop().call_later(0.01, lambda: [queue.push(tokens(7, "stop")) for queue in queues[:2]])
    assert [choice for choice, _ in await generation.wait()] == [0, 1]
    assert generation.running
    queues[2].push(tokens(8, "stop"))
    assert [choice for choice, _ in await generation.wait()] == [2]
    assert not generation.running


async def test_a_listener_is_called_once_for_all_that_came_in_one_turn_of_the_loop() -> None:
    queues = [TokenQueue(str(number), lambda _: None) for number in range(3)]
    generation = Generation(queues)
    taken: list[int] = []
    generation.listen(lambda: taken.append(len(generation.take())))
    for queue in queues:
        queue.push(tokens(1))
        queue.push(tokens(2))
    await asyncio.sleep(0.01)
    assert taken == [6]
    generation.listen(None)
    queues[0].push(tokens(3))
    await asyncio.sleep(0.01)
    assert taken == [6]


class Pipe:
    """The part of a transport that writes."""

    def __init__(self, log: list[str], *, closing: bool = False) -> None:
        self._log = log
        self._closing = closing

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes) -> None:
        self._log.append(data.decode())


async def test_a_turn_reads_everything_before_it_writes_anything() -> None:
    log: list[str] = []
    turn = Turn()

    def reads(name: str, *, closing: bool = False) -> None:
        log.append(f"read {name}")
        turn.write(Pipe(log, closing=closing), f"write {name}".encode())  # type: ignore[arg-type]

    listeners = {name: partial(reads, name, closing=name == "c") for name in "abc"}
    for name in "abcab":
        turn.soon(listeners[name])
    await asyncio.sleep(0)
    assert log == ["read a", "read b", "read c", "write a", "write b"]
    turn.write(Pipe(log), b"alone")  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert log[5:] == ["alone"]


async def test_a_turn_writes_in_rows() -> None:
    log: list[str] = []
    turn = Turn()
    for _ in range(ROW + 1):
        turn.write(Pipe(log), b"x")  # type: ignore[arg-type]
    assert len(log) == ROW
    await asyncio.sleep(0)
    assert len(log) == ROW + 1


async def test_all_that_comes_in_one_turn_has_the_same_time() -> None:
    turn = Turn()
    loop = asyncio.get_running_loop()
    before = loop.time()
    now = turn.time()
    assert before <= now <= loop.time()
    while loop.time() == now:
        pass
    turn.write(Pipe([]), b"x")  # type: ignore[arg-type]
    assert turn.time() == now
    await asyncio.sleep(0)
    assert turn.time() > now, "the next turn reads the clock again"


async def test_a_listener_that_fails_takes_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    called: list[int] = []
    turn = Turn()

    def fails_and_comes_back() -> None:
        turn.soon(lambda: called.append(2))
        raise ValueError("broken")

    turn.soon(fails_and_comes_back)
    turn.soon(lambda: called.append(1))
    await asyncio.sleep(0)
    assert called == [1]
    assert "broken" in caplog.text
    await asyncio.sleep(0)
    assert called == [1, 2]


async def test_a_submission_that_is_refused_halfway_leaves_nothing_running() -> None:
    aborted: list[str] = []

    class Engine:
        count = 0

        async def generate(self, request: object, *, rank: int | None = None) -> TokenQueue:
            self.count += 1
            if self.count == 3:
                raise Overloaded("full")
            return TokenQueue(str(self.count), aborted.append)

    with pytest.raises(Overloaded):
        await Generation.start(Engine(), [None] * 5, rank=None)  # type: ignore[arg-type,list-item]
    assert aborted == ["1", "2"]


async def test_leaving_the_scope_aborts_what_still_runs() -> None:
    aborted: list[str] = []
    queues = [TokenQueue(str(number), aborted.append) for number in range(3)]
    async with Generation(queues) as generation:
        queues[1].push(tokens(1, "stop"))
        await generation.wait()
    assert aborted == ["0", "2"]
