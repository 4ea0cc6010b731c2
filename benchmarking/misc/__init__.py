"""Paths that are documented and stay where they are."""
