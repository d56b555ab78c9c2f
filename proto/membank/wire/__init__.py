"""What both ends of membank's wire share: domain types, errors, payload framing, bank format.

Modules: `spec` (what a bank is), `records` (what is said about it), `errors` (the error tree),
`framing` (payload streams), `convert` (messages to domain types), `crc`, `format` (the read-only
half of the bank format). No torch, no ray, no zarr.
"""
