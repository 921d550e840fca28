"""The HTTP port of one API process of a node, with the engine ranks behind it and its siblings beside it."""

import math
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry

from api.app import build_app
from api.backend import EngineInfo
from api.settings import ApiSettings
from api.tokenizer import Tokenizer
from node.config import NodeConfig
from node.engine_client import NodeEngineClient
from node.engine_link import EngineLink
from node.metrics import NodeMetrics
from node.siblings import Siblings
from runtime.channel import ChannelAddress
from runtime.errors import ConfigError
from runtime.process import calm_garbage_collector


class SurfaceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an API process is told at its start. `info.process` says which one it is."""

    config: NodeConfig
    info: EngineInfo
    directory: str
    """Where the processes of the node meet; only this user can enter it."""

    def channel(self, rank: int) -> ChannelAddress:
        return ChannelAddress(self.directory, rank, self.config.api_processes)


class HttpSurface:
    """Prepared and opened when the ranks can take work, closed before they stop."""

    def __init__(self, spec: SurfaceSpec, links: Sequence[EngineLink], tokenizer: Tokenizer) -> None:
        config = spec.config
        self.registry = registry = CollectorRegistry()
        recompute = config.engine.kv_load_failure_policy == "recompute"
        self.client = NodeEngineClient(spec.info, links, NodeMetrics(registry).on_handover, recompute=recompute)
        self.app = build_app(self.client, tokenizer, _share(config.api, config.api_processes), registry)
        self._config = config
        self._siblings: Siblings | None = None
        if config.api_processes > 1:
            self._siblings = Siblings(self.app, Path(spec.directory), spec.info.process, config.api_processes)
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=1.0)

    async def prepare(self) -> None:
        """Be there for the siblings. They all are before one of them has clients."""
        # Requests leave cycles behind, so an API process collects more often than a rank, and little at a time: what
        # new requests bring to look through keeps the streams of others waiting (512 at once: 5 to 10 ms, not 33).
        calm_garbage_collector((2_000, 5, 100))
        await self._runner.setup()
        if self._siblings is not None:
            await self._siblings.open(self._runner)

    async def open(self) -> None:
        """Listen on the node's port. Raises ConfigError when it is taken."""
        host, port = self._config.host, self._config.port
        shared = self._config.api_processes > 1
        site = web.TCPSite(self._runner, host, port, reuse_address=True, reuse_port=shared or None, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None

    async def close(self) -> None:
        """Open requests end with an error, then every connection is closed."""
        self.client.fail_all("the node stops")
        await self._runner.cleanup()
        if self._siblings is not None:
            await self._siblings.close()


def check_port_is_free(host: str, port: int) -> None:
    """Raises ConfigError when anybody listens there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _share(settings: ApiSettings, num_processes: int) -> ApiSettings:
    """One process's part of what the settings allow the node."""
    return msgspec.structs.replace(
        settings,
        max_concurrent_requests=math.ceil(settings.max_concurrent_requests / num_processes),
        response_store_entries=math.ceil(settings.response_store_entries / num_processes),
        response_store_bytes=math.ceil(settings.response_store_bytes / num_processes),
    )
