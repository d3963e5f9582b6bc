"""A verl run's own settings, read from where they stand: a launch script, a YAML configuration, or overrides."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_fuse.errors import OptionError

_KEY = re.compile(r"\+{0,2}([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")


@dataclass(frozen=True)
class RunConfig:
    """Dotted keys and environment variables as texts; what a script leaves to its caller is absent."""

    values: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str, default: str | None = None) -> str | None:
        return self.values.get(key, default)

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        """True, False, or None where it is neither."""
        text = self.values.get(key)
        return default if text is None else {"true": True, "1": True, "false": False, "0": False}.get(text.lower())

    def number(self, key: str, default: int | None = None) -> int | None:
        text = self.values.get(key)
        if text is None:
            return default
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def under(self, prefix: str) -> dict[str, str]:
        """The keys below `prefix`, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.values.items() if k.startswith(f"{prefix}.")}


def read_run(source: str) -> RunConfig:
    """`source`: the path of a launch script or of a YAML file, or overrides as one text. Raises `OptionError`."""
    path = Path(source)
    try:
        is_file = path.is_file()
    except OSError:  # a long line of overrides is no path
        is_file = False
    if is_file and path.suffix in (".yaml", ".yml"):
        return RunConfig(dict(_flattened(_yaml(path))))
    if not is_file and "=" not in source:
        raise OptionError(
            f"{source!r} is neither a file nor overrides of the form key=value",
            remedy="name a launch script, a YAML configuration, or give the overrides in quotes",
        )
    return _script(path.read_text(encoding="utf-8") if is_file else source)


def _yaml(path: Path) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as missing:
        raise OptionError(f"{path} needs PyYAML", remedy="pip install pyyaml, or give the overrides") from missing
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and not str(value).startswith("${"):
        yield prefix, str(value)


def _script(text: str) -> RunConfig:
    """Assignments and overrides in the order of the text: variables are put in where the script gave them a value."""
    shell: dict[str, str] = {}
    values: dict[str, str] = {}
    for word in _words(text):
        found = _KEY.fullmatch(word)
        if found is None:
            continue
        key, value = found[1], _VARIABLE.sub(lambda m: _value_of(m, shell), found[2])
        if "$" in value:
            continue
        if "." in key:
            values[key] = value
        else:
            shell[key] = value
    return RunConfig(values, {k: v for k, v in shell.items() if k.isupper()})


def _value_of(found: re.Match[str], shell: Mapping[str, str]) -> str:
    known = shell.get(found[1] or found[3])
    return known if known is not None else found[2] if found[2] is not None else found[0]


def _words(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line.strip().strip("()"), comments=True)
        except ValueError:  # a quote that goes on in the next line
            words = line.split()
        yield from words
