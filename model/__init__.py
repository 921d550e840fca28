"""DeepSeek-V4 in torch: configuration, layers, state and checkpoint. Knows batches, not requests."""
