"""A cache of blocks around whatever they are fetched from, and the files under it."""
