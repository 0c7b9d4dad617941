"""What a run leaves behind: its folder, clips, report, W&B run, and what people see on the terminal."""
