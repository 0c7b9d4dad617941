"""The models: loading, calling, what they are made of and what a forward costs."""
