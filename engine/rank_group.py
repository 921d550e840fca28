"""The ranks that share a model's experts: how they meet, and the collectives between their devices.

A meeting point (a small key-value server in rank 0) lets them find each other. Then there are two ways between them:
`mesh` carries what they agree on before each step, host to host; the collectives move tensors, over gloo between CPU
ranks and NCCL between GPUs. Both offer the same calls on buffers of equal size, so that one piece of code serves both
and a captured graph can hold it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.lockstep import RECORD_BYTES
from engine.peer_mesh import Listener, PeerMesh
from engine.peer_watch import PeerWatch
from runtime.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

_END_S = 5.0


class Pending:
    """A collective under way. On a GPU `wait` orders the current stream behind it and returns at once."""

    def __init__(self, work: Any, rank: int) -> None:
        self._work = work
        self._rank = rank

    def wait(self) -> None:
        """Raises EngineError when a peer is gone or late."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise EngineError(f"rank {self._rank} lost a peer: {error}") from error


class RankGroup:
    """The connections of one rank to its group: created together, closed together.

    host: the address at which the others reach this rank.
    meeting: host:port where rank 0 listens and everybody meets.
    device: where the tensors of the collectives live.
    timeout_s: bounds the meeting and every later wait for a peer; a peer that dies is noticed at once.
    terms: what all ranks must have configured alike, by name.
    Raises EngineError when the others do not come or have other terms, ConfigError when torch has no NCCL for a GPU.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        host: str,
        meeting: str,
        device: torch.device,
        timeout_s: float,
        terms: Mapping[str, str],
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._ending: threading.Thread | None = None
        self._ends = threading.Lock()
        timeout = timedelta(seconds=timeout_s)
        meeting_host, _, port = meeting.rpartition(":")
        try:
            listener = Listener(rank, host)
            try:
                store = dist.TCPStore(
                    meeting_host, int(port), size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
                )
                if rank == 0:
                    store.set("token", os.urandom(16).hex())
                store.set(f"address/{rank}", listener.address)
                addresses = {peer: store.get(f"address/{peer}").decode() for peer in range(size) if peer != rank}
                token = bytes.fromhex(store.get("token").decode())
                # All compare all, so that all know and nobody waits for one that went away.
                store.set(f"terms/{rank}", json.dumps(dict(terms)))
                everybody = [json.loads(store.get(f"terms/{peer}")) for peer in range(size)]
                for peer in range(size):
                    _compare(peer, everybody[peer], everybody[0])
            except BaseException:
                listener.close()
                raise
            self._store = store
            self.mesh = PeerMesh(rank, listener.connect(addresses, token, time.monotonic() + timeout_s), RECORD_BYTES)
            try:
                self._backend = _backend(dist.PrefixStore("tensors", store), rank, size, host, device, timeout)
            except BaseException:
                self.mesh.close()
                raise
            self._watch = PeerWatch(self.mesh, self.abort)
        except (ConfigError, EngineError):
            raise
        except Exception as error:
            raise EngineError(f"rank {rank} cannot join its group of {size} at {meeting}: {error}") from error
        log.info("rank %d of %d has met the others at %s", rank, size, meeting)

    def least(self, value: int, timeout_s: float) -> int:
        """The smallest of what all ranks call with, in the same order; also a way to wait for all of them. For the
        start: later the connections carry rounds. Raises EngineError when a peer is gone or late."""
        self.mesh.send(value.to_bytes(RECORD_BYTES, "little"))
        return min([value, *(int.from_bytes(said, "little") for said in self.mesh.receive(timeout_s).values())])

    def all_gather(self, output: Tensor, mine: Tensor) -> Pending:
        """output [size * n, ...] = everybody's `mine` [n, ...], by rank. Contiguous, equal shapes on all ranks."""
        return self._start("_allgather_base", output, mine)

    def all_to_all(self, output: Tensor, mine: Tensor) -> Pending:
        """Part r of `mine` [size * n, ...] goes to rank r; output: the parts meant for this rank, by sender."""
        return self._start("alltoall_base", output, mine, [], [])

    def _start(self, collective: str, *operands: Any) -> Pending:
        try:
            return Pending(getattr(self._backend, collective)(*operands), self.rank)
        except RuntimeError as error:
            raise EngineError(f"rank {self.rank} lost a peer: {error}") from error

    def abort(self) -> None:
        """Let collectives go that wait for peers, without their results, and begin to end what carries them. Returns at
        once, from any thread: the end takes until captured steps that hold collectives are gone."""
        self._begin_to_end(self._backend.abort)

    def close(self) -> None:
        """Waits for no peer. Engines whose captured steps hold collectives must be closed before (`engine.ending`)."""
        self._watch.stop()
        self.mesh.close()
        # NCCL's orderly end takes all ranks, and one may be gone; what this one had to do is done.
        ending = self._begin_to_end(self._backend.abort if self.device.type == "cuda" else self._backend.shutdown)
        ending.join(_END_S)
        if ending.is_alive():
            log.error("rank %d: the connections of its group did not end within %s s", self.rank, _END_S)

    def _begin_to_end(self, end: Callable[[], None]) -> threading.Thread:
        """In a thread, once."""
        with self._ends:
            if self._ending is None:
                self._ending = threading.Thread(target=end, name="group-end", daemon=True)
                self._ending.start()
            return self._ending


def _compare(rank: int, terms: Mapping[str, str], of_first: Mapping[str, str]) -> None:
    for name in sorted(terms.keys() | of_first.keys()):
        found, wanted = terms.get(name), of_first.get(name)
        if found != wanted:
            raise EngineError(f"rank {rank} has {name}={found}, but rank 0 of its group has {wanted}")


def _backend(store: Any, rank: int, size: int, host: str, device: torch.device, timeout: timedelta) -> Any:
    """The library that moves tensors of `device` between ranks."""
    if device.type != "cuda":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)
    if not hasattr(dist, "ProcessGroupNCCL"):
        raise ConfigError(f"experts shared between GPUs ({device}) need a torch with NCCL, and this one has none")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(store, rank, size, options)
    # The communicator must exist before a graph is captured.
    backend.eager_connect_single_device(device)
    return backend
