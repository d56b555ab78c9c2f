"""The client of a bank: connect, route, fetch, push, operate. No torch, Ray or zarr."""

__all__: list[str] = []
