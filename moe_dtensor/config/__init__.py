"""Config: TOML tables as frozen dataclasses. Loads no torch."""
