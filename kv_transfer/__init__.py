"""Moves one request's state between ranks: format, transfer state machine, leases, Mooncake. Knows bytes, not models."""
