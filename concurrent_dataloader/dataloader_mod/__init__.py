"""Batches: torch's DataLoader, whose workers fetch many samples at once, batches ahead."""
