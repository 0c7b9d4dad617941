"""The harness: what `run.py` runs. `erta`, the library, knows nothing of it."""
