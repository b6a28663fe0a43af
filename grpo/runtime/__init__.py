"""What a run needs around the algorithm: ranks, shards, checkpoints, logs, settings."""
