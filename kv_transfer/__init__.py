"""Moves one request's state between ranks: format, state machine, leases, Mooncake. Knows bytes, not models."""
