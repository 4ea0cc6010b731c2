"""Batches: torch's DataLoader, whose workers fetch many samples at once and several batches ahead."""
