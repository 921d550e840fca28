"""Real vLLM nodes with the Mooncake connector: what they say over HTTP, turned into what the registry needs.

A prefill node's ranks are known by their Mooncake engine ids, which its bootstrap server tells. The ids change when the
node restarts, so the table is asked again when the node was down, when a decode node failed to load state, and when it
has aged; and a table that lacks a rank makes the node not ready: another rank's id would lead to the wrong engine.
"""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import orjson

from router.config import NodesConfig, StaticNode
from router.exchange import UpstreamError
from router.nodes import NodeInfo, RankInfo, Role
from router.registry import Registry, Release
from router.static_nodes import Asker, NotReady, Seen

DEFAULT_BOOTSTRAP_PORT = 8998
NO_SUCH_MODEL = "tandem-router-releases-a-transfer"

_ENGINE = re.compile(rb'^vllm:[^{\n]*\{[^}\n]*engine="(\d+)"', re.MULTILINE)


class VllmProbe:
    """One vLLM node."""

    def __init__(
        self,
        node: StaticNode,
        role: Role,
        asker: Asker,
        config: NodesConfig,
        registry: Registry,
        clock: Callable[[], float],
    ) -> None:
        self._url = node.url.rstrip("/")
        self._role = role
        self._asker = asker
        self._config = config
        self._registry = registry
        self._clock = clock
        host = urlsplit(self._url).hostname
        self._bootstrap = f"http://{host}:{node.bootstrap_port or DEFAULT_BOOTSTRAP_PORT}"
        self._info: NodeInfo | None = None
        self._asked_at = 0.0

    def forget(self) -> None:
        """Something said that the table may be wrong: ask again at the next look."""
        self._info = None

    async def look(self) -> Seen:
        try:
            health = await self._asker.get(self._url, "/health")
            if health.head.status != 200:
                raise NotReady(f"{self._url}/health answered {health.head.status}")
            if self._info is None or self._clock() - self._asked_at > self._config.table_age_s:
                self._info = await self._describe()
                self._asked_at = self._clock()
            return Seen(self._info)
        except (UpstreamError, NotReady):
            self._info = None
            raise

    async def release(self, release: Release) -> None:
        """Free the state of a prefill that nobody fetches.

        vLLM has no call for it. But its front end, when it refuses a decode request, has the prefill side told to let
        go; so a decode node is asked for a model that does not exist, with this transfer's parameters.
        """
        if self._role is not Role.PREFILL or not release.computed:
            return
        decodes = self._registry.targets(Role.DECODE)
        if not decodes:
            raise NotReady("no decode node is there to pass the release on")
        body = {
            "model": NO_SUCH_MODEL,
            "prompt": [1],
            "max_tokens": 1,
            "kv_transfer_params": {
                "do_remote_decode": False,
                "do_remote_prefill": True,
                "transfer_id": release.transfer_id,
                "remote_bootstrap_addr": release.rank.handoff_address,
                "remote_engine_id": release.rank.epoch,
            },
        }
        await self._asker.post(decodes[0].node.info.url, "/v1/completions", orjson.dumps(body))

    async def _describe(self) -> NodeInfo:
        size = await self._data_parallel_size()
        if self._role is Role.PREFILL:
            engine_ids = await self._engine_ids(size)
            ranks = tuple(RankInfo(rank, engine_id, self._bootstrap) for rank, engine_id in enumerate(engine_ids))
        else:
            ranks = tuple(RankInfo(rank, "", "") for rank in range(size))
        return NodeInfo(
            node_id=self._url,
            role=self._role,
            url=self._url,
            model_id=await self._model(),
            ranks=ranks,
            local_prefill=self._role is Role.DECODE,
            dialect="vllm",
        )

    async def _data_parallel_size(self) -> int:
        """Distinct engines in the node's metrics; the configured number where it names none."""
        metrics = await self._asker.get(self._url, "/metrics")
        engines = set(_ENGINE.findall(metrics.body)) if metrics.head.status == 200 else set()
        return len(engines) or self._config.intra_node_data_parallel_size

    async def _model(self) -> str:
        models = await self._asker.json(self._url, "/v1/models")
        try:
            return str(models["data"][0]["id"])
        except (LookupError, TypeError):
            raise NotReady(f"{self._url}/v1/models names no model") from None

    async def _engine_ids(self, size: int) -> list[str]:
        table = await self._asker.json(self._bootstrap, "/query")
        if not isinstance(table, dict):
            raise NotReady(f"{self._bootstrap}/query answered no table")
        missing = [rank for rank in range(size) if str(rank) not in table]
        if missing:
            raise NotReady(f"{self._bootstrap}/query lacks ranks {missing} of {size}")
        try:
            return [str(table[str(rank)]["engine_id"]) for rank in range(size)]
        except (LookupError, TypeError):
            raise NotReady(f"{self._bootstrap}/query has an entry without an engine_id") from None
