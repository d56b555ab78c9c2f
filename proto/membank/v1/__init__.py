"""Generated messages and stubs of the membank.v1 wire protocol."""

__all__: list[str] = []
