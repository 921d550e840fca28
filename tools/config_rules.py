"""What must hold between the processes of one deployment and the machines they run on: one line per problem.

Rules see configurations and a described topology, never the network or a GPU; `tools.check_configs` runs them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from model.config import ModelConfig
from node.config import NodeConfig
from router.config import RouterConfig
from tools.memory_plan import GIB, MemoryPlan, plan, state_layout
from tools.topology import LOOPBACK, Process

PORTS_PER_RANK = 50
"""Mooncake takes two ports a rank, and those of a rank that just ended stay taken for about a minute."""


def problems(processes: Sequence[Process], model: ModelConfig) -> list[str]:
    """Everything that is wrong with a deployment, one line each; empty when it can run."""
    found = [
        *_gpus(processes),
        *_groups(processes),
        *_ports(processes),
        *_addresses(processes),
        *_routers(processes),
        *_transports(processes),
        *_agreement(processes, model),
        *_deadlines(processes),
        *_memory(processes, model),
    ]
    return list(dict.fromkeys(found))


def nodes_of(processes: Sequence[Process]) -> list[tuple[Process, NodeConfig]]:
    return [(p, p.config) for p in processes if isinstance(p.config, NodeConfig)]


def routers_of(processes: Sequence[Process]) -> list[tuple[Process, RouterConfig]]:
    return [(p, p.config) for p in processes if isinstance(p.config, RouterConfig)]


def hands_over(process: Process) -> bool:
    """Whether the process takes part in transfers."""
    return process.place.module != "router" and getattr(process.config, "prefill", "remote") != "local"


def _gpus(processes: Sequence[Process]) -> Iterator[str]:
    users: dict[tuple[str, int], str] = {}
    for process, node in nodes_of(processes):
        gpus = process.place.gpus
        if process.host.gpus == 0 and not gpus:
            if node.engine.device != "cpu":
                yield f"{process.name}: engine.device={node.engine.device}, but the host has no GPUs"
            continue
        if node.engine.device == "cpu":
            yield f"{process.name}: is given GPUs {list(gpus)}, but engine.device=cpu"
        if len(gpus) != node.data_parallel_size:
            yield f"{process.name}: data_parallel_size={node.data_parallel_size} ranks on {len(gpus)} GPUs {list(gpus)}"
        for gpu in gpus:
            if not 0 <= gpu < process.host.gpus:
                yield f"{process.name}: GPU {gpu}, but host {process.host.name} has GPUs 0..{process.host.gpus - 1}"
            elif (other := users.setdefault((process.host.name, gpu), process.name)) != process.name:
                yield f"{process.name}: GPU {gpu} is also given to {other}"


def _groups(processes: Sequence[Process]) -> Iterator[str]:
    """Nodes that share their experts with others: every rank is there once, and they meet where rank 0 is."""
    groups: dict[str, list[tuple[Process, NodeConfig]]] = defaultdict(list)
    for process, node in nodes_of(processes):
        if node.expert_parallel.address:
            groups[node.expert_parallel.address].append((process, node))
    for address, members in groups.items():
        host = address.rpartition(":")[0]
        owner: dict[int, str] = {}
        for process, node in members:
            first = node.expert_parallel.first_rank
            if first == 0 and not process.host.is_called(host):
                yield f"{process.name}: has rank 0, but expert_parallel.address={address} is not on {process.host.name}"
            for rank in range(first, first + node.data_parallel_size):
                if (other := owner.setdefault(rank, process.name)) != process.name:
                    yield f"{process.name}: rank {rank} of the group at {address} is also in {other}"
            if node.expert_ranks != members[0][1].expert_ranks:
                yield f"{process.name}: expert_parallel.ranks={node.expert_ranks} differs in the group at {address}"
        if missing := set(range(members[0][1].expert_ranks)) - owner.keys():
            yield f"group at {address}: nobody has rank(s) {sorted(missing)}"


def listening_ports(process: Process) -> dict[str, int]:
    """Every fixed port the process listens on, by what it is for."""
    config = process.config
    if isinstance(config, RouterConfig):
        ports = {"server.port": config.server.port}
        if config.cluster.port is not None:
            ports["cluster.port"] = config.cluster.port
        return ports
    ports = {"port": config.port}
    if config.bootstrap_port is not None:
        ports["bootstrap_port"] = config.bootstrap_port
    if hands_over(process) and config.transfer.handoff_port:
        for rank in range(config.data_parallel_size):
            ports[f"transfer.handoff_port of rank {rank}"] = config.transfer.handoff_port + rank
    return ports


def _ports(processes: Sequence[Process]) -> Iterator[str]:
    taken: dict[tuple[str, int], str] = {}
    ranges: dict[tuple[str, tuple[int, int]], int] = defaultdict(int)
    for process in processes:
        for purpose, port in listening_ports(process).items():
            mine = f"{process.name} ({purpose})"
            if not 0 <= port <= 65535:
                yield f"{mine}: {port} is not a port"
            elif port and (other := taken.setdefault((process.host.name, port), mine)) != mine:
                yield f"{mine}: port {port} is also that of {other}"
        if isinstance(process.config, NodeConfig) and hands_over(process):
            ranges[process.host.name, process.config.transfer.port_range] += process.config.data_parallel_size
    for (host, (low, high)), ranks in ranges.items():
        if high - low + 1 < PORTS_PER_RANK * ranks:
            yield f"host {host}: transfer.port_range {low}-{high} is for {ranks} ranks, {PORTS_PER_RANK} ports each"
        for (other_host, port), owner in taken.items():
            if other_host == host and low <= port <= high:
                yield f"{owner}: port {port} lies in the transfer.port_range {low}-{high} of that host"


def _addresses(processes: Sequence[Process]) -> Iterator[str]:
    one_host = len({process.host.name for process in processes}) == 1
    for process, node in nodes_of(processes):
        told = {"advertise_host": node.advertise_host or node.host}
        if hands_over(process):
            told["transfer.host"] = node.transfer.host
        for key, address in told.items():
            if address in LOOPBACK and one_host:
                continue
            if not process.host.is_called(address):
                yield f"{process.name}: {key}={address} is not a name of host {process.host.name}"
        listens = {"host": node.host}
        if hands_over(process):
            listens["transfer.bind_host"] = node.transfer.bind_host or node.transfer.host
        for key, address in listens.items():
            if address in LOOPBACK and not one_host:
                yield f"{process.name}: {key}={address} cannot be reached from the other hosts"
    ids = [node.id for _, node in nodes_of(processes)]
    for doubled in sorted({node_id for node_id in ids if ids.count(node_id) > 1}):
        yield f"node_id {doubled} is that of {ids.count(doubled)} nodes: the later one would replace the others"


def _routers(processes: Sequence[Process]) -> Iterator[str]:
    routers = routers_of(processes)
    one_host = len({process.host.name for process in processes}) == 1

    def is_router(address: str) -> bool:
        host, _, port = address.rpartition(":")
        return any(
            str(config.cluster.port) == port and (router.host.is_called(host) or (host in LOOPBACK and one_host))
            for router, config in routers
        )

    for process, node in nodes_of(processes):
        for address in node.membership.routers:
            if not is_router(address):
                yield f"{process.name}: membership.routers: {address} is no router's cluster address"
        listed = {url for _, config in routers for url in _static_urls(config)}
        if routers and not node.membership.routers and node.http_url not in listed:
            yield f"{process.name}: membership.routers is empty and no router lists {node.http_url}"
    for process, config in routers:
        known = {node.http_url for _, node in nodes_of(processes)}
        for url in _static_urls(config):
            if config.nodes.dialect == "tandem" and url not in known:
                yield f"{process.name}: nodes: {url} ({urlsplit(url).hostname}) is no node of this deployment"
        if config.cluster.host in LOOPBACK and not one_host:
            yield f"{process.name}: cluster.host={config.cluster.host} cannot be reached from the other hosts"
    roles = {process.place.module for process, _ in nodes_of(processes) if hands_over(process)}
    if roles and roles != {"prefill_node", "decode_node"}:
        yield f"states are handed over, but there are only {roles.pop()}s"
    if roles and not routers:
        yield "prefill and decode nodes without a router"


def _static_urls(config: RouterConfig) -> list[str]:
    return [node.url.rstrip("/") for node in (*config.nodes.prefill, *config.nodes.decode)]


def _transports(processes: Sequence[Process]) -> Iterator[str]:
    used: dict[str, list[str]] = defaultdict(list)
    hosts = set()
    for process, node in nodes_of(processes):
        if not hands_over(process):
            continue
        used[node.transfer.transport].append(process.name)
        hosts.add(process.host.name)
        if node.transfer.transport == "rdma" and not process.host.nics:
            yield f"{process.name}: transfer.transport=rdma, but host {process.host.name} has no NICs"
        for key, devices in _named_devices(node):
            for device in devices:
                if device not in process.host.nics:
                    yield f"{process.name}: {key}: {device} is not one of {list(process.host.nics)}"
    if len(used) > 1:
        yield f"transfer.transport differs: {'; '.join(f'{kind} in {names}' for kind, names in sorted(used.items()))}"
    if "intra_node" in used and len(hosts) > 1:
        yield f"transfer.transport=intra_node across hosts {sorted(hosts)}"


def _named_devices(node: NodeConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "transfer.devices", node.transfer.devices
    for rank, devices in enumerate(node.transfer.devices_by_rank):
        yield f"transfer.devices_by_rank of rank {rank}", devices


def _agreement(processes: Sequence[Process], model: ModelConfig) -> Iterator[str]:
    named = {process.name: node.model_id for process, node in nodes_of(processes)}
    named |= {process.name: config.model for process, config in routers_of(processes) if config.model is not None}
    if len(set(named.values())) > 1:
        yield f"model names differ: {named}"
    formats = {}
    for process, node in nodes_of(processes):
        if hands_over(process):
            layout = state_layout(model, node)
            formats[process.name] = (layout.row_format, layout.index_format, layout.page_tokens)
    if len(set(formats.values())) > 1:
        yield f"state formats (rows, index keys, block_size) differ: {formats}"


def _deadlines(processes: Sequence[Process]) -> Iterator[str]:
    for router, config in routers_of(processes):
        deadlines = config.deadlines
        if deadlines.first_byte_s < deadlines.prefill_s:
            yield (
                f"{router.name}: deadlines.first_byte_s={deadlines.first_byte_s:g} ends before "
                f"deadlines.prefill_s={deadlines.prefill_s:g} does"
            )
        for process, node in nodes_of(processes):
            if process.place.module == "prefill_node" and deadlines.state_hold_s > node.transfer.hold_unclaimed_s:
                yield (
                    f"{router.name}: deadlines.state_hold_s={deadlines.state_hold_s:g} counts on states that "
                    f"{process.name} gives up after transfer.hold_unclaimed_s={node.transfer.hold_unclaimed_s:g}"
                )


def _memory(processes: Sequence[Process], model: ModelConfig) -> Iterator[str]:
    for process, node in nodes_of(processes):
        engine = node.engine
        longest = model.max_position_embeddings if engine.max_model_len == "auto" else engine.max_model_len
        if longest > model.max_position_embeddings:
            yield f"{process.name}: engine.max_model_len={longest} exceeds the model's {model.max_position_embeddings}"
        if not process.place.gpus:
            continue
        memory = plan_of(process, node, model)
        parts = (
            f"{memory.budget / GIB:.1f} GiB less {memory.weights / GIB:.1f} of weights, {memory.workspace / GIB:.1f} "
            f"of workspace and {memory.slots / GIB:.1f} for {memory.num_slots} slots leaves {memory.free / GIB:.1f}"
        )
        if memory.num_pages == 0 or memory.pages > memory.free:
            yield f"{process.name}: no memory for {memory.num_pages or 'any'} pages: {parts}"
        elif engine.max_model_len != "auto" and memory.tokens < longest:
            yield f"{process.name}: engine.max_model_len={longest}, but {parts}: pages for {memory.tokens} tokens"


def plan_of(process: Process, node: NodeConfig, model: ModelConfig) -> MemoryPlan:
    """The memory of one of its ranks on its host's GPUs."""
    return plan(
        model,
        node,
        gpu_memory_bytes=int(process.host.gpu_memory_gib * GIB),
        holds_states=process.place.module == "prefill_node",
    )
