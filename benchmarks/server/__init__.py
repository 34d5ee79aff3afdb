"""The server over HTTP and gRPC beside its peers, as ratios taken in one run: `python -m benchmarks.http`."""
