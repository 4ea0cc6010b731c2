"""An object server with latency and faults, for tests, demonstrations and benchmarks."""
