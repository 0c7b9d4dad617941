"""VBench: its dimensions and prompts, its worker process, its scores."""
