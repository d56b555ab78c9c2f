"""The shard engine: plain classes that run without Ray, gRPC or a network."""
