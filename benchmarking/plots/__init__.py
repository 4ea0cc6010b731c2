"""One figure a file: reads results, runs nothing."""
