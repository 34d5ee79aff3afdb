"""Ours against the peers: run by hand; every figure is a ratio taken side by side in one run."""
