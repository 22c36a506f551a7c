"""The step engine: what it does is what the pump does, one phase at a time."""
