"""Analysis of finished runs. Reads their records only, and imports no torch."""
