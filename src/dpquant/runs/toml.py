# SPDX-License-Identifier: Apache-2.0
"""Values as TOML, for which Python has a reader and no writer."""


def toml_of(value: str | int | float | bool) -> str:
    """Return a value as TOML that reads back as the same value."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in value)
            return f'"{escaped}"'
        case _:
            return repr(value)
