"""A second process that continues requests from the bytes of their state alone."""

from multiprocessing.connection import Connection

import msgspec
import torch

from tests.model.helpers import Pools, Request, pools, random_model, small_config, step

CONFIG = {"num_hidden_layers": 4, "compress_ratios": (0, 4, 16, 4, 0), "num_hash_layers": 2}
DECODED = 2


class State(msgspec.Struct, array_like=True):
    """One request after its prompt."""

    length: int
    first_token: int
    pages: bytes
    slot: bytes


def model_and_pools(numerics: str, dtype: str, rows: str, keys: str, num_pages: int, num_slots: int, poison: int):
    torch.set_num_threads(1)
    model = random_model(small_config(**CONFIG), numerics=numerics, dtype=getattr(torch, dtype))
    return model, pools(model.config, rows, keys, num_pages=num_pages, num_slots=num_slots, poison=poison)


def decode(model: object, state: Pools, requests: list[Request], tokens: list[int]) -> bytes:
    """Greedy tokens of all requests together, step by step; the logits of every step as bytes."""
    said = []
    for _ in range(DECODED):
        logits = step(model, state.views, [(r, [t]) for r, t in zip(requests, tokens, strict=True)])
        tokens = logits.argmax(dim=-1).tolist()
        said.append(logits.numpy().tobytes())
    return b"".join(said)


def main(connection: Connection, how: tuple[str, str, str, str], num_pages: int, num_slots: int) -> None:
    """Answers each list of states with the logits of decoding them, until the connection closes."""
    model, state = model_and_pools(*how, num_pages, num_slots, 0x7F)
    while True:
        try:
            states = msgspec.msgpack.decode(connection.recv_bytes(), type=list[State])
        except EOFError:
            return
        requests = []
        free = list(range(num_pages))  # from the end: other numbers than where the state comes from
        for number, item in enumerate(states):
            count = len(item.pages) // state.layout.page_bytes
            request = Request(num_slots - 1 - number, [free.pop() for _ in range(count + 1)], item.length)
            state.slots[request.slot] = torch.frombuffer(bytearray(item.slot), dtype=torch.uint8)
            for index, page in enumerate(torch.frombuffer(bytearray(item.pages), dtype=torch.uint8).view(count, -1)):
                state.pages[request.pages[index]] = page
            requests.append(request)
        connection.send_bytes(decode(model, state, requests, [item.first_token for item in states]))
