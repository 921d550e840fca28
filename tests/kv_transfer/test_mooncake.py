"""How Mooncake is set up, and what is refused before anything starts."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kv_transfer.config import RdmaConfig, TransferConfig
from kv_transfer.mooncake import apply_environment, environment
from runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("transport", "variable"),
    [("tcp", "MC_FORCE_TCP"), ("rdma", "MC_FORCE_HCA"), ("intra_node", "MC_INTRANODE_NVLINK")],
)
def test_each_transport_forces_itself_and_no_other(transport, variable):
    settings = environment(TransferConfig(transport=transport))
    forcing = {"MC_FORCE_TCP", "MC_FORCE_HCA", "MC_INTRANODE_NVLINK"}
    assert forcing & settings.keys() == {variable}
    assert settings["MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER"] == "65535"


def test_the_engine_gives_a_stalled_connection_up_before_we_do_and_its_backstop_is_last():
    settings = environment(TransferConfig(read_deadline_s=10.0))
    progress, backstop = int(settings["MC_TCP_PROGRESS_TIMEOUT_SEC"]), int(settings["MC_TRANSFER_TIMEOUT"])
    assert progress < 10.0 < backstop


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (96, 4)])
def test_io_threads_come_with_cores_and_move_larger_pieces(monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    settings = environment(TransferConfig())
    assert settings.get("MC_NUM_TCP_IO_THREADS", "1") == str(threads)
    assert ("MC_TCP_SLICE_SIZE" in settings) == (threads > 1)
    assert environment(TransferConfig(tcp_io_threads=3))["MC_NUM_TCP_IO_THREADS"] == "3"
    assert "MC_NUM_TCP_IO_THREADS" not in environment(TransferConfig(transport="intra_node", tcp_io_threads=3))


def test_rdma_settings_reach_the_engine_only_when_given():
    rdma = RdmaConfig(gid_index=3, traffic_class=106, nvidia_peermem=True)
    settings = environment(TransferConfig(transport="rdma", rdma=rdma))
    assert (settings["MC_GID_INDEX"], settings["MC_IB_TC"], settings["WITH_NVIDIA_PEERMEM"]) == ("3", "106", "1")
    assert "MC_MTU" not in settings


@pytest.mark.parametrize(
    "name", ["MC_TCP_PROTO", "MC_TCP_ENABLE_CONNECTION_POOL", "MC_DISABLE_METACACHE", "MC_FORCE_SHM", "MC_FORCE_HCA"]
)
def test_a_variable_that_breaks_the_engine_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        apply_environment(TransferConfig(), {name: "1"})


def test_a_variable_that_contradicts_the_configuration_is_refused_and_one_that_agrees_is_not():
    with pytest.raises(ConfigError, match=r"MC_TCP_LANES_PER_PEER=2 .* says 8"):
        apply_environment(TransferConfig(), {"MC_TCP_LANES_PER_PEER": "2"})
    apply_environment(TransferConfig(), {"MC_TCP_LANES_PER_PEER": "8"})


def test_memory_that_other_processes_cannot_open_is_refused_where_they_must():
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}
    with pytest.raises(ConfigError, match=r"PYTORCH_CUDA_ALLOC_CONF=.*cannot open"):
        apply_environment(TransferConfig(transport="intra_node"), dict(environ))
    apply_environment(TransferConfig(transport="rdma"), dict(environ))


def test_what_a_parent_process_set_is_not_taken_for_an_operators():
    environ: dict[str, str] = {}
    apply_environment(TransferConfig(lanes_per_peer=4), environ)
    apply_environment(TransferConfig(transport="rdma", lanes_per_peer=8), environ)
    assert environ["MC_TCP_LANES_PER_PEER"] == "8"
    assert "MC_FORCE_TCP" not in environ


def start_agent(config: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """An agent in a process of its own; prints the type and message of what kept it from starting."""
    script = f"""
        import numpy as np
        from kv_transfer.agent import TransferAgent
        from kv_transfer.config import TransferConfig
        from kv_transfer.format import StateFormat
        from kv_transfer.regions import MemoryRegion
        pool = np.zeros(1 << 20, dtype=np.uint8)
        region = MemoryRegion(pool.ctypes.data, 4096, 8)
        slots = MemoryRegion(pool.ctypes.data + 8 * 4096, 4096, 8)
        format = StateFormat(model_fingerprint="m", layout={{}}, page_bytes=4096, slot_bytes=4096, page_tokens=256)
        agent = TransferAgent(TransferConfig({config}), format, pages=region, slots=slots, rank=0)
        try:
            agent.start(20.0)
            print("started", agent.address)
            agent.stop()
        except Exception as error:
            print(type(error).__name__, error)
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MC_", "TANDEM_"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_a_transport_that_the_machine_cannot_provide_fails_at_start_and_is_named():
    output = start_agent("transport='rdma'").stdout
    assert output.startswith("ConfigError transport=rdma"), output


def test_a_forbidden_variable_fails_the_start():
    output = start_agent("", MC_TCP_PROTO="1").stdout
    assert output.startswith("ConfigError MC_TCP_PROTO=1"), output


def test_a_taken_port_fails_the_start(spawn_peer):
    peer = spawn_peer()
    port = peer.address.rpartition(":")[2]
    output = start_agent(f"handoff_port={port}").stdout
    assert output.startswith("ConfigError cannot listen"), output
    assert port in output
