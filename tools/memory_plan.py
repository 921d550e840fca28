"""What one rank keeps in its GPU's memory, by the model's own tables: weights, slots, pages. No torch, no GPU."""

from __future__ import annotations

import functools

import msgspec

from model.config import ModelConfig
from model.inventory import expert_of, inventory
from model.state_layout import StateLayout, build_state_layout
from node.config import NodeConfig

GIB = 1 << 30
WORKSPACE_BASE = 2 * GIB
"""Context, communicators, libraries' workspaces and captured graphs."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank."""

    budget: int
    """What the rank may use in all."""
    weights: int
    workspace: int
    """Activations of the largest step, and `WORKSPACE_BASE`."""
    num_slots: int
    slots: int
    """Bytes, with those of the spare slot for padding."""
    free: int
    """What is left for pages; negative when the rest does not fit either."""
    num_pages: int
    page_bytes: int
    page_tokens: int

    @property
    def pages(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def tokens(self) -> int:
        """Tokens whose history fits."""
        return self.num_pages * self.page_tokens


def rank_weights(config: ModelConfig, expert_ranks: int) -> int:
    """Bytes of one rank's weights: its share of the routed experts (the largest one), everything else in full."""
    replicated, experts = _weights(config.to_json())
    share = -(-config.n_routed_experts // expert_ranks)
    return replicated + experts // config.n_routed_experts * share


@functools.cache
def _weights(config_json: bytes) -> tuple[int, int]:
    """(bytes of everything but routed experts, bytes of routed experts). All experts of a model are equally large."""
    replicated = experts = 0
    for tensor in inventory(ModelConfig.from_json(config_json)):
        if expert_of(tensor.name) is None:
            replicated += tensor.num_bytes
        else:
            experts += tensor.num_bytes
    return replicated, experts


def step_workspace(config: ModelConfig, num_tokens: int, expert_ranks: int, part_tokens: int) -> int:
    """Bytes of activations alive at once in a step of `num_tokens`.

    Two copies of the residual streams, the query heads before and after attention, the two halves of the grouped
    output, and the inputs and hidden rows of every token's chosen experts, all in bfloat16. Ranks that share experts
    see the tokens of all of them, so many at a time; beside those they hold the sums they send and receive in float32,
    and the rows that wait.
    """
    streams = 2 * config.hc_mult * config.hidden_size
    heads = 2 * config.num_attention_heads * config.head_dim + 2 * config.o_groups * config.o_lora_rank
    experts = config.num_experts_per_tok * (config.hidden_size + 2 * config.moe_intermediate_size)
    if expert_ranks == 1:
        return 2 * num_tokens * (streams + heads + experts)
    together = expert_ranks * min(num_tokens, part_tokens)
    exchanged = together * config.hidden_size * 2 * 4 + expert_ranks * num_tokens * config.hidden_size
    return 2 * num_tokens * (streams + heads) + 2 * together * experts + exchanged


def state_layout(config: ModelConfig, node: NodeConfig) -> StateLayout:
    """The node's pages and slots. "auto" formats are those of released numerics on a GPU."""
    engine = node.engine
    plain = engine.numerics == "plain"
    return build_state_layout(
        config,
        row_format=("bf16" if plain else "fp8") if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype,
        index_format=("bf16" if plain else "mxfp4") if engine.index_cache_dtype == "auto" else engine.index_cache_dtype,
        page_tokens=engine.block_size,
    )


def plan(config: ModelConfig, node: NodeConfig, *, gpu_memory_bytes: int, holds_states: bool) -> MemoryPlan:
    """One rank of `node` on a GPU of that size. `holds_states`: finished prompts stay beside the running ones."""
    engine = node.engine
    layout = state_layout(config, node)
    weights = rank_weights(config, node.expert_ranks)
    part_tokens = node.expert_parallel.part_tokens_for(node.expert_ranks)
    workspace = WORKSPACE_BASE + step_workspace(config, engine.max_step_tokens, node.expert_ranks, part_tokens)
    num_slots = engine.max_num_seqs + (engine.max_held_requests if holds_states else 0)
    slots = (num_slots + 1) * layout.slot_bytes
    budget = gpu_memory_bytes
    if engine.kv_cache_memory_bytes is None:
        budget = int(gpu_memory_bytes * engine.gpu_memory_utilization)
    free = budget - weights - workspace - slots
    if engine.kv_cache_memory_bytes is not None:
        free = min(free, engine.kv_cache_memory_bytes - slots)
    longest = config.max_position_embeddings if engine.max_model_len == "auto" else engine.max_model_len
    most = max(0, min(free // layout.page_bytes, num_slots * layout.pages_for(longest)))
    num_pages = most if engine.num_pages == "auto" else engine.num_pages
    return MemoryPlan(
        budget=budget,
        weights=weights,
        workspace=workspace,
        num_slots=num_slots,
        slots=slots,
        free=free,
        num_pages=num_pages,
        page_bytes=layout.page_bytes,
        page_tokens=layout.page_tokens,
    )
