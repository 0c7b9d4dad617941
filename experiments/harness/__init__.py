"""What every experiment stands on: configuration, arms, calibrations, samples, rows, worker processes."""
