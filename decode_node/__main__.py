"""`python -m decode_node --config decode.yaml`: receive state, stream tokens."""

from decode_node.config import DecodeNodeConfig
from node.main import run_node

if __name__ == "__main__":
    run_node(
        "decode_node",
        "Receive the state of prompts from prefill nodes and generate; with `prefill: local`, serve alone.",
        DecodeNodeConfig,
        role_of=lambda config: config.role,
    )
