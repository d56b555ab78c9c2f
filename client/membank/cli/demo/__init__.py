"""The whole story on one machine: build, serve, train, ask, remove, bring back, report."""
