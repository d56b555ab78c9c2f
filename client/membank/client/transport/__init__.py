"""How a call reaches one shard, or the gateway: over gRPC, past grpcio, or through shared memory.

`contract` says what a transport does; `grpc_transport` and `same_host` are the two there are. Where
fetched bytes land, and how often they are copied until then, is decided in here.
"""
