"""Prompts: which ones a run uses, and files of them."""
