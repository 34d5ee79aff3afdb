"""The nine UCI regression sets: Monte Carlo dropout beside its published reference, split by split."""
