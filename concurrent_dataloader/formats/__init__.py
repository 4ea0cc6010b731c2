"""Bytes to samples and back: pure, without network and processes."""
