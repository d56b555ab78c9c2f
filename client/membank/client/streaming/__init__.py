"""Fetches whose first layers are used while the others are still on their way."""
