"""The bank service: store, shard, cluster, RPC and knowledge operations."""

__all__: list[str] = []
