"""Traffic in, verdict out: Locust users that know the server by HTTP only."""
