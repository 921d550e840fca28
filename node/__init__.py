"""What prefill and decode nodes share: the engine processes, the bridge to the transfer, membership in the cluster."""
