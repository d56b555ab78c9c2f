"""The load generator behind `membank bench fetch`, `push`, `mixed` and `train`.

What is asked for is in `workload` and `presets`; `load` runs it from processes of their own
(`client_process`) against a service of the user's or one that `embedded` makes; `results` holds
what came of it, and `comparison` sets it against an earlier run. What measures the store, without
a network, is `membank.bank_service.bench`.
"""
