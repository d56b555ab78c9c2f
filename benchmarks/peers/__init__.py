"""The same work on membank and on what else could do it, side by side in one run."""
