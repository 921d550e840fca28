"""The pages for operators name keys, files and headings that exist."""

import re
from pathlib import Path

import pytest

from decode_node.config import DecodeNodeConfig
from node.config import NodeConfig
from router.config import RouterConfig
from tests.deploy.shipped import ROOT
from tools.config_reference import sections

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OURS = ["configuration.md", "deployment.md", "operations.md"]

FLAGS = (
    "--kv-cache-dtype --block-size --port --data-parallel-size --enable-expert-parallel --tokenizer-mode "
    "--reasoning-parser --max-model-len --max-num-batched-tokens --max-num-seqs --enforce-eager cudagraph_mode "
    "max_cudagraph_capture_size --no-disable-hybrid-kv-cache-manager --disable-uvicorn-access-log kv_connector "
    "kv_role kv_load_failure_policy kv_buffer_device enforce_handshake_compat mooncake_protocol "
    "VLLM_MOONCAKE_BOOTSTRAP_PORT VLLM_ENGINE_READY_TIMEOUT_S VLLM_RPC_TIMEOUT VLLM_LOG_STATS_INTERVAL "
    "--policy --prefill --decode --host --intra-node-data-parallel-size --kv-connector"
)


def keys() -> set[str]:
    """Every key and section of every process."""
    found: set[str] = set()
    for kind in (NodeConfig, DecodeNodeConfig, RouterConfig):
        for section, rows in sections(kind):
            found.add(section)
            found |= {row[0].strip("`") for row in rows}
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("name", OURS)
def test_keys_and_files_that_are_named_exist(name: str) -> None:
    known = keys()
    heads = {key.partition(".")[0] for key in known if "." in key}
    for word in re.findall(r"`([^`\n]+)`", (DOCS / name).read_text()):
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", word) and word.partition(".")[0] in heads:
            assert word in known, word
        if re.fullmatch(r"(deploy|configs|docs|tools)/[\w./-]+", word):
            assert (ROOT / word).exists(), word


def test_every_flag_of_the_documented_deployment_is_mapped() -> None:
    rows = [line for line in (DOCS / "configuration.md").read_text().splitlines() if line.startswith("| ")]
    for flag in FLAGS.split():
        answers = [row.split(" | ", 1)[1] for row in rows if flag in row.split(" | ", 1)[0]]
        assert answers, flag
        assert all(re.search(r"`[\w.]+`|not needed|not offered|no key|the same", answer) for answer in answers), flag


def test_modules_and_options_in_examples_exist() -> None:
    for name in OURS:
        for module in re.findall(r"python -m ([\w.]+)", (DOCS / name).read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
