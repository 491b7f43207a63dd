"""Reading a config.json: every value checked, and errors that name the key, what stands there and what may."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_REQUIRED: Any = object()


class Fields:
    """The entries of a config.json. Getters take the default that transformers has, or raise where there is none."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.model_type = self.values.get("model_type")

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        if name in self.values:
            return self.values[name]
        if default is _REQUIRED:
            raise ValueError(f"config.json of model_type {self.model_type!r} lacks {name!r}")
        return default

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number, as it stands or as 2.0; a default of None lets null through."""
        value = self.get(name, default)
        if value is None and default is None:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.error(name, value, "an integer")
        return int(value)

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.get(name, default)
        if value is None and default is None:
            return value
        return self._float(name, value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def pair(self, name: str, default: Any = _REQUIRED) -> tuple[float, float]:
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise self.error(name, value, "a pair of numbers")
        return self._float(name, value[0]), self._float(name, value[1])

    def only(self, name: str, supported: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """A value of which only some are supported here."""
        value = self.get(name, default)
        if value not in supported:
            raise self.error(name, value, " or ".join(repr(choice) for choice in supported))
        return value

    def error(self, name: str, value: Any, supported: str) -> ValueError:
        return ValueError(
            f"config.json of model_type {self.model_type!r} has {name}={value!r}, which is not supported: "
            f"it has to be {supported}"
        )

    def _float(self, name: str, value: Any) -> float:
        if isinstance(value, dict) and set(value) == {"__float__"}:  # how transformers writes what JSON has no word for
            value = {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, value, "a number")
        return float(value)
