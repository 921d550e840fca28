"""`python -m prefill_node --config prefill.yaml`: turn prompts into state and a first token."""

from node.main import run_node
from prefill_node.config import PrefillNodeConfig

if __name__ == "__main__":
    run_node(
        "prefill_node",
        "Compute prompts, hand their state to decode nodes.",
        PrefillNodeConfig,
        role_of=lambda config: "prefill",
    )
