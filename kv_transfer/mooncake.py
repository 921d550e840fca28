"""The only file that knows Mooncake. One object is one transfer engine: it reads peers' memory into ours.

What this wraps, and why it looks the way it does:
* Mooncake is configured by environment variables that it reads when it is imported, so they are set first, and those
  that would break its guarantees are refused when an operator set them.
* What is submitted must have a certain end, after which nothing of it touches memory again. Two forms have: one
  contiguous block per id, polled without blocking, and a ticket over many blocks (wheels from 0.3.14). Sync and batch
  calls may return while I/O goes on, and the id of a batch may be done when its first block is.
* Blocks under one ticket are served one after the other by one connection, so over TCP single blocks are faster. Within
  a node a submit costs more than the copy of a page, so there a ticket carries many.
* Over TCP what was read into a device's memory may still be on its way there when the read is done: see `settle`.
* Id 0 is how a submit reports failure; passing it on would crash the process. Ids are freed when terminal.
* The protocol argument does not choose the transport. What was chosen is read back from the engine's own descriptor.
* First contact with a peer may block for seconds inside a lock that all submits share: see `Reader`.
* Destroying an engine takes about a second with the GIL held, and ends every read for good.
"""

import importlib.metadata
import logging
import os
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from kv_transfer.config import TransferConfig
from kv_transfer.descriptor import DescriptorError, read_descriptor
from kv_transfer.pieces import Piece
from kv_transfer.regions import HOST_MEMORY, MemoryRegion, PoolMemory
from runtime.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

_PACKAGES = ("mooncake-transfer-engine-cuda13", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
PROTOCOLS = {"tcp": "tcp", "rdma": "rdma", "intra_node": "nvlink_intra"}
"""transport -> what the engine's descriptor says."""
_FORBIDDEN = ("MC_TCP_PROTO", "MC_TCP_ENABLE_CONNECTION_POOL", "MC_DISABLE_METACACHE", "MC_FORCE_SHM", "MC_USE_TENT")
"""Completion before arrival; dozens of times slower; transfers that always fail; not compiled in."""
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_SET_BY_US = "TANDEM_TRANSFER_ENVIRONMENT"
"""Names of the variables a Tandem process set, so that its children do not take them for an operator's."""
_SLICE_BYTES = 1 << 20
_TICKET_PIECES = 64
_COPY_S = 0.0003
"""Longer than a device takes for the pieces of one ticket that are still under way when they are all submitted."""
_DRAIN_MS = 1000


class ReadState(Enum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


ReadHandle = Any
"""A read under way: an id of the engine, or a ticket."""


def environment(config: TransferConfig) -> dict[str, str]:
    """The variables Mooncake is run with."""
    low, high = config.port_range
    settings: dict[str, str] = {
        "MC_LOG_LEVEL": "ERROR",
        "MC_MIN_RPC_PORT": str(low),
        "MC_MAX_RPC_PORT": str(high),
        # The default bound of the queue wedges the peer for good when it is passed.
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_TCP_LANES_PER_PEER": str(config.lanes_per_peer),
        # A stalled connection is given up well before our own deadline, and that before the engine's backstop.
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(max(1, int(config.read_deadline_s / 2))),
        "MC_TCP_STATUS_TIMEOUT_SEC": str(max(1, int(config.read_deadline_s / 2))),
        "MC_HANDSHAKE_CONNECT_TIMEOUT": str(max(1, int(config.connect_timeout_s / 2))),
        "MC_TRANSFER_TIMEOUT": str(max(120, int(4 * config.read_deadline_s))),
    }
    match config.transport:
        case "tcp":
            settings["MC_FORCE_TCP"] = "1"
            if config.num_tcp_io_threads > 1:
                settings["MC_NUM_TCP_IO_THREADS"] = str(config.num_tcp_io_threads)
                # Threads that copy 64 KiB of device memory at a time mostly wait for each other.
                settings["MC_TCP_SLICE_SIZE"] = str(_SLICE_BYTES)
        case "rdma":
            settings["MC_FORCE_HCA"] = "1"
            settings |= _rdma_environment(config)
        case "intra_node":
            settings["MC_INTRANODE_NVLINK"] = "1"
    return settings


def _rdma_environment(config: TransferConfig) -> dict[str, str]:
    rdma = config.rdma
    values = {
        "MC_IB_PORT": rdma.ib_port,
        "MC_GID_INDEX": rdma.gid_index,
        "MC_PKEY_INDEX": rdma.pkey_index,
        "MC_MTU": rdma.mtu,
        "MC_IB_TC": rdma.traffic_class,
        "MC_IB_SL": rdma.service_level,
        "MC_NUM_QP_PER_EP": rdma.num_qp_per_endpoint,
        "MC_WORKERS_PER_CTX": rdma.workers_per_context,
        "MC_SLICE_SIZE": rdma.slice_bytes,
        "MC_MAX_WR": rdma.max_work_requests,
        "MC_RETRY_CNT": rdma.retry_count,
        "MC_IB_PCI_RELAXED_ORDERING": rdma.relaxed_ordering,
        "MC_RDMA_BIND_ADDRESS": rdma.bind_address,
        "MC_CUSTOM_TOPO_JSON": rdma.topology_file,
        "MC_NIC_PEER_AFFINITY": rdma.peer_affinity,
        "WITH_NVIDIA_PEERMEM": 1 if rdma.nvidia_peermem else None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def apply_environment(config: TransferConfig, environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Set Mooncake's variables before it is imported. ConfigError names every variable an operator must not set."""
    ours = set(environ.get(_SET_BY_US, "").split(","))
    settings = environment(config)
    transports = {"MC_FORCE_TCP", "MC_FORCE_HCA", "MC_INTRANODE_NVLINK", "MC_FORCE_MNNVL"} - settings.keys()
    for name in sorted({*_FORBIDDEN, *transports}):
        if name in environ:
            if name not in ours:
                raise ConfigError(f"{name}={environ[name]} must not be set (transport={config.transport})")
            del environ[name]
    for name in _ALLOCATOR if config.transport == "intra_node" else ():
        if "expandable_segments:true" in environ.get(name, "").lower():
            raise ConfigError(f"{name}={environ[name]}: other processes cannot open memory of expandable segments")
    for name, value in settings.items():
        if name not in ours and environ.get(name, value) != value:
            raise ConfigError(f"{name}={environ[name]} is set in the environment: the `transfer` section says {value}")
    environ.update(settings)
    environ[_SET_BY_US] = ",".join(sorted(settings))


_environment_in_use: dict[str, str] = {}


def _load(config: TransferConfig) -> Any:
    """Import the extension with its environment in place; later engines of this process must want the same one."""
    wanted = environment(config)
    if not _environment_in_use:
        apply_environment(config)
        _environment_in_use.update(wanted)
    elif differing := sorted(k for k, v in wanted.items() if _environment_in_use.get(k) != v):
        raise ConfigError(f"this process already runs a transfer engine with other settings: {', '.join(differing)}")
    try:
        import mooncake.engine
    except ImportError as error:
        raise ConfigError(
            f"Mooncake cannot be imported: {error}. It needs the system packages libibverbs1, libnuma1 and libcurl4 "
            f"(GPU wheels also ibverbs-providers and the CUDA runtime)"
        ) from None
    return mooncake.engine


def engine_version() -> str:
    """Name and version of the installed wheel."""
    for package in _PACKAGES:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


class MooncakeEngine:
    """One transfer engine with its registered regions. Every method but `connect` and `close` returns at once."""

    def __init__(
        self, config: TransferConfig, regions: tuple[MemoryRegion, ...], memory: PoolMemory = HOST_MEMORY
    ) -> None:
        """Raises ConfigError when the engine, a registration or the transport is not what the config asks for."""
        module = _load(config)
        # A thread without the device's context can neither register its memory nor open that of a peer.
        memory.bind_thread()
        self._memory = memory
        self._engine: Any = module.TransferEngine()
        protocol = PROTOCOLS[config.transport]
        if self._engine.initialize(config.host, "P2PHANDSHAKE", protocol, ",".join(config.devices)) != 0:
            raise ConfigError(
                f"transport={config.transport}: the transfer engine did not start "
                f"(devices {', '.join(config.devices) or 'any'}, ports {config.port_range[0]}-{config.port_range[1]})"
            )
        port = self._engine.get_rpc_port()
        self.session_id = f"{config.host}:{port}"
        status = self._engine.batch_register_memory(
            [region.base_address for region in regions], [region.num_bytes for region in regions]
        )
        if status != 0:
            raise ConfigError(f"registering {sum(r.num_bytes for r in regions)} bytes for transfer failed: {status}")
        try:
            chosen = read_descriptor("127.0.0.1", port, config.connect_timeout_s).get("protocol")
        except DescriptorError as error:
            raise ConfigError(f"the transfer engine does not describe itself: {error}") from None
        if chosen != protocol:
            raise ConfigError(f"transport={config.transport} is configured, but the transfer engine chose {chosen!r}")
        # Within a node a read is done when its copies are; otherwise the device may still have to take bytes in.
        self._settles = config.transport != "intra_node"
        self._tickets = config.transport == "intra_node" and hasattr(self._engine, "submit_scatter_read")
        self.max_pieces = _TICKET_PIECES if self._tickets else 1
        """How many pieces one read may have."""
        self.spin_s = _COPY_S if self._tickets else 0.0
        """For how long after a submit it pays to poll without a pause."""
        log.info("transfer engine %s: %s over %s", self.session_id, engine_version(), config.transport)

    def submit(self, session_id: str, pieces: Sequence[Piece]) -> ReadHandle:
        """Start one read of up to `max_pieces`. TransferError if the engine does not take it."""
        if self._tickets:
            return self._submit_ticket(session_id, pieces)
        (piece,) = pieces
        read_id = self._engine.batch_transfer_async_read(session_id, [piece.local], [piece.remote], [piece.num_bytes])
        if read_id == 0:
            raise TransferError(f"the transfer engine refused a read of {piece.num_bytes} bytes from {session_id}")
        return read_id

    def _submit_ticket(self, session_id: str, pieces: Sequence[Piece]) -> Any:
        """The pieces as offsets in the one range that spans them on either side: a range of its own for each costs a
        third more. What lies between them is neither read nor written."""
        local, remote = min(piece.local for piece in pieces), min(piece.remote for piece in pieces)
        return self._engine.submit_scatter_read(
            session_id,
            [local],
            [max(piece.local + piece.num_bytes for piece in pieces) - local],
            [remote],
            [max(piece.remote + piece.num_bytes for piece in pieces) - remote],
            [[piece.local - local for piece in pieces]],
            [[piece.remote - remote for piece in pieces]],
            [[piece.num_bytes for piece in pieces]],
        )

    def connect(self, session_id: str, pieces: Sequence[Piece]) -> ReadHandle:
        """`submit` for the first read from a session: connects to it, which may block, so it is called on a thread of
        its own. That thread must outlive the engine: the intra-node path copies on a stream that belongs to the thread
        that submitted, and polling a read whose stream is gone crashes the process.
        """
        self._memory.bind_thread()
        handle = self.submit(session_id, pieces)
        # A peer that cannot be reached gives a ticket that has failed already, where an id would be refused.
        if self._tickets and handle.drain(0).name == "FAILED_DRAINED":
            raise TransferError(f"the transfer engine cannot reach {session_id}")
        return handle

    def poll(self, read: ReadHandle) -> ReadState:
        """The state of a read. Once it is not PENDING the handle is used up and must not be used again."""
        if self._tickets:
            outcome = read.drain(0)
            if not read.drained:
                return ReadState.PENDING
            return ReadState.DONE if outcome.name == "COMPLETED" else ReadState.FAILED
        status = self._engine.transfer_check_status(read)
        if status == 1:
            return ReadState.DONE
        # -2 says that the engine's own patience ended, not that the read did: the id stays pending.
        return ReadState.PENDING if status in (0, -2) else ReadState.FAILED

    def settle(self) -> None:
        """What was polled as ended, with whatever outcome, has no effect on memory after this. To be called before
        anybody is told of an end."""
        if self._settles:
            self._memory.settle()

    @property
    def raw(self) -> Any:
        """Mooncake's own object, for measurements."""
        return self._engine

    def close(self, reads: Iterable[ReadHandle] = ()) -> None:
        """Destroy the engine: no read into our memory, and none from it, goes on afterwards. About a second.

        reads: those that were not polled to their end. Ids end with the engine, tickets with the copies they stand for.
        """
        if self._tickets:
            for read in reads:
                read.drain(_DRAIN_MS)
                if not read.drained:
                    log.error("a read within the node has not ended after %d ms", _DRAIN_MS)
        self._engine = None
        self.settle()
