"""How one model is spread over processes: groups, ZeRO engines, gradient bookkeeping, the CPU platform."""
