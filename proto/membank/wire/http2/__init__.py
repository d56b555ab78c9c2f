"""HTTP/2 (RFC 9113) for one call at a time per connection, whose bytes stay where they lie. Blocking.

What both ends share: `frames` and `headers` as they travel, `BufferedSocket` below them, and
`Http2End`, which a client's and a server's end derive from; above it `messages`, as gRPC cuts them.
"""
