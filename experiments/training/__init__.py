"""Training of the embedded models: `python run.py experiment=train_tiny model=wan21_tiny`."""
