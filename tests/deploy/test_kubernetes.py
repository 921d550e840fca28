"""The manifests are valid Kubernetes, and say what configs/gb200 says."""

from typing import Any

import kubernetes_validate
import pytest
import yaml

from node.config import NodeConfig
from router.config import RouterConfig
from tests.deploy.shipped import CONFIGS, DEPLOY, ROOT, command_line, http_port, load, stop_s
from tools.config_rules import PORTS_PER_RANK

FOLDER = DEPLOY / "kubernetes"
VERSION = "1.31"
POD = {"$(POD_IP)": "10.1.2.3", "$(POD_NAME)": "tandem-0"}


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}:{document['kind']}:{document['metadata']['name']}", document)
        for path in sorted(FOLDER.glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


BY_NAME = dict(documents())
ROUTER = BY_NAME["router.yaml:Deployment:tandem-router"]
NODES = {role: BY_NAME[f"{role}.yaml:LeaderWorkerSet:tandem-{role}"] for role in ("prefill", "decode")}


def template_of(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]
    template: dict[str, Any] = (
        spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["workerTemplate"]
    )
    return template


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = template_of(workload)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def config_of(workload: dict[str, Any]) -> NodeConfig | RouterConfig:
    """Its file, read with its arguments, after the pod's own values are put in."""
    module, file, overrides = command_line(container_of(workload)["args"])
    for name, value in POD.items():
        overrides = [override.replace(name, value) for override in overrides]
    return load(ROOT / file, module, overrides)


WORKLOADS = {"router": ROUTER, **NODES}


@pytest.mark.parametrize(("name", "document"), documents(), ids=[name for name, _ in documents()])
def test_a_manifest_is_valid(name: str, document: dict[str, Any]) -> None:
    if "." not in document["apiVersion"].partition("/")[0] or "k8s.io" in document["apiVersion"]:
        if document["kind"] == "LeaderWorkerSet":
            # Not part of Kubernetes itself: what it makes pods from is.
            spec = document["spec"]["leaderWorkerTemplate"]
            assert set(spec) <= {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
            document = {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": document["metadata"],
                "template": spec["workerTemplate"],
            }
        try:
            kubernetes_validate.validate(document, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {error.message}")
    assert isinstance(document["metadata"]["name"], str)


def test_the_kustomization_lists_every_manifest_and_knows_every_image() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml", "monitoring.yaml"}
    assert set(kustomization["resources"]) == files
    images = {image["name"]: image["newTag"] for image in kustomization["images"]}
    assert {container_of(workload)["image"] for workload in WORKLOADS.values()} == set(images)
    assert {path.suffix[1:] for path in (DEPLOY / "images").iterdir()} == set(images.values())


@pytest.mark.parametrize("role", WORKLOADS)
def test_ports_and_grace_periods_are_those_of_the_file(role: str) -> None:
    config, container = config_of(WORKLOADS[role]), container_of(WORKLOADS[role])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == http_port(config)
    pause = container["lifecycle"]["preStop"]["exec"]["command"] if "lifecycle" in container else []
    pause_s = sum(int(word) for word in pause if word.isdigit())
    assert template_of(WORKLOADS[role])["spec"]["terminationGracePeriodSeconds"] > stop_s(config) + pause_s
    if isinstance(config, RouterConfig):
        assert pause_s > 0, "the service goes on sending connections for a moment"
        assert ports["cluster"] == config.cluster.port
        assert (config.server.host, config.cluster.host) == ("0.0.0.0", "0.0.0.0")
    else:
        assert ports["handoff"] == config.transfer.handoff_port
        probe = container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= config.ready_timeout_s


@pytest.mark.parametrize("role", NODES)
def test_a_node_tells_others_its_pods_address_and_finds_the_router(role: str) -> None:
    config = config_of(NODES[role])
    assert isinstance(config, NodeConfig)
    assert config.http_url == f"http://10.1.2.3:{config.port}"
    assert config.transfer.host == "10.1.2.3"
    assert config.id == "tandem-0"
    assert config.host == config.transfer.bind_host == "0.0.0.0"
    service = BY_NAME["router.yaml:Service:tandem-router"]
    cluster = next(port for port in service["spec"]["ports"] if port["name"] == "cluster")
    assert config.membership.routers == (f"{service['metadata']['name']}:{cluster['port']}",)
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= template_of(ROUTER)["metadata"]["labels"].items()
    env = {variable["name"] for variable in container_of(NODES[role])["env"]}
    assert {f"$({name})" for name in env} == set(POD)


@pytest.mark.parametrize("role", NODES)
def test_a_node_gets_a_gpu_per_rank_rdma_and_its_models(role: str) -> None:
    config, container = config_of(NODES[role]), container_of(NODES[role])
    assert isinstance(config, NodeConfig)
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == config.data_parallel_size
    assert any(name.startswith("rdma/") for name in limits) == (config.transfer.transport == "rdma")
    assert container["resources"]["requests"].items() >= {k: v for k, v in limits.items() if "/" in k}.items()
    security = container["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert security["runAsUser"] == 0, "added capabilities reach root only"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.engine.model.startswith(mounts["models"] + "/")
    assert set(mounts) == {volume["name"] for volume in template_of(NODES[role])["spec"]["volumes"]}


def allowed(policy: str) -> list[tuple[str, set[int]]]:
    """(who, ports) of every ingress rule."""
    rules = []
    for rule in BY_NAME[f"network-policy.yaml:NetworkPolicy:{policy}"]["spec"]["ingress"]:
        ports = {n for port in rule["ports"] for n in range(port["port"], port.get("endPort", port["port"]) + 1)}
        rules.append((str(rule.get("from", "anyone")), ports))
    return rules


def test_mooncakes_ports_are_open_to_nodes_alone() -> None:
    configs = [config_of(workload) for workload in NODES.values()]
    transfer: set[int] = set()
    http: set[int] = set()
    for config in configs:
        assert isinstance(config, NodeConfig)
        low, high = config.transfer.port_range
        assert high - low + 1 >= PORTS_PER_RANK * config.data_parallel_size
        transfer |= set(range(low, high + 1))
        transfer |= {config.transfer.handoff_port + rank for rank in range(config.data_parallel_size)}
        http.add(config.port)
    for who, ports in allowed("tandem-nodes"):
        if "tandem/node" in who:
            assert ports == transfer
        else:
            assert ports == http
            assert "matchLabels" in who
    for workload in NODES.values():
        assert template_of(workload)["metadata"]["labels"]["tandem/node"] == "true"


def test_only_nodes_may_register() -> None:
    config = config_of(ROUTER)
    assert isinstance(config, RouterConfig)
    rules = allowed("tandem-router")
    assert ("anyone", {config.server.port}) in rules
    assert [who for who, ports in rules if config.cluster.port in ports] == [
        str([{"podSelector": {"matchLabels": {"tandem/node": "true"}}}])
    ]


def test_the_arguments_name_files_of_configs() -> None:
    for workload in WORKLOADS.values():
        _, file, _ = command_line(container_of(workload)["args"])
        assert (ROOT / file).is_relative_to(CONFIGS)
        assert (ROOT / file).is_file()
