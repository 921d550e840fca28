"""The DeepSeek-V4 prompt format: typed messages in, prompt segments out. No requests, no tokenizer."""
