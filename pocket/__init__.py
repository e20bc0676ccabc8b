"""A tiny but real embedded world for demos and tests."""
