"""What methods share: budgets by a knob, counted caches, module caches, recorders, published constants, paths."""
