"""YAML files with dotted overrides, merged by OmegaConf and validated by pydantic, with errors a person can act on."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gru4recf_dist.data import filesystems, storage
from gru4recf_dist.data.storage_config import StorageConfig
from gru4recf_dist.errors import UserError
from gru4recf_dist.section import Section

Settings = TypeVar("Settings", bound=BaseModel)


class _OnlyStorage(Section):
    storage: StorageConfig = StorageConfig()


def load(
    schema: type[Settings],
    path: str | None,
    overrides: list[str],
    mend: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Settings:
    """Read ``path`` (any fsspec URL), apply ``key.sub=value`` overrides and validate against ``schema``.

    Where the schema has a section `storage`, this process reaches files with it from then on.

    Args:
        mend: what is made of the file's content before the overrides.

    Raises:
        UserError: the file is missing or not YAML, an override is malformed, a key is unknown (the closest real
            key is named), or a value has the wrong type or is out of bounds.
    """
    use_storage(schema, overrides)
    base = _read(path) if path else {}
    if mend is not None:
        base = mend(OmegaConf.to_container(OmegaConf.create(base)))
    content = _merged(schema, base, overrides, path or "overrides")
    _use_storage(schema, content)
    return _validated(schema, content)


def validated(schema: type[Settings], content: dict[str, Any], overrides: list[str]) -> Settings:
    """As `load`, of values that a program has put together; they may be few, the others are the schema's defaults."""
    return _validated(schema, _merged(schema, content, overrides, "overrides"))


def use_storage(schema: type[BaseModel], overrides: list[str]) -> None:
    """Reach files with what the overrides say of the section `storage`, if they do: nothing else is read.

    Raises:
        UserError: an override is malformed, or one of that section's is wrong.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            shown = filesystems.without_userinfo(override)
            raise UserError(f"'{shown}': an override reads key=value, such as seed=1")
    _use_storage(schema, _merged(schema, {}, overrides, "overrides"))


def _merged(schema: type[BaseModel], base: Any, overrides: list[str], source: str) -> Any:
    """``base`` with the overrides, as plain values."""
    merged = OmegaConf.create(base)
    key = ""
    try:
        for culprit in overrides:
            key = culprit.partition("=")[0]
            if not _holds_secrets(schema, key):
                filesystems.refuse_userinfo(culprit, filesystems.without_userinfo(key))
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([culprit]))
        culprit = source
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        key = getattr(error, "full_key", None) or key
        if _holds_secrets(schema, key):
            # What the parser says quotes the value.
            raise UserError(f"{key}: cannot be parsed; put the value in quotes, and a backslash before ${{") from None
        raise UserError(f"{culprit}: {_problem(error)}") from error


def _use_storage(schema: type[BaseModel], content: Any) -> None:
    """Let the section `storage` act at once: the recipe itself may lie on object storage."""
    filesystems.hide_environment()
    if "storage" in schema.model_fields and isinstance(content, dict) and "storage" in content:
        filesystems.configure(_validated(_OnlyStorage, {"storage": content["storage"]}).storage)


def _validated(schema: type[Settings], content: Any) -> Settings:
    for key, text in _texts(content):
        if not _holds_secrets(schema, key):
            filesystems.refuse_userinfo(text, key)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(_explain(schema, detail) for detail in error.errors()[:3])) from error


def _texts(content: Any, key: str = "") -> typing.Iterator[tuple[str, str]]:
    """Every text among plain values, and the key at which it stands; those of a list have the list's."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, key)
    elif isinstance(content, str):
        yield key, content


def dump(settings: BaseModel) -> str:
    """The resolved settings as YAML, in the order of their declaration."""
    # OmegaConf's own writer quotes what its reader would take for a number, such as 12e4.
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))


def _read(path: str) -> DictConfig:
    content = storage.read_bytes(path)
    try:
        loaded = OmegaConf.create(content.decode())
    except AssertionError as error:
        # OmegaConf's way to refuse a file that holds a single number.
        raise UserError(f"{path}: must hold a mapping of keys to values") from error
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({_problem(error)})") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    return loaded


def _problem(error: Exception) -> str:
    """What the parser says, which may be over several lines; without what OmegaConf adds to it, which is indented."""
    return " ".join(str(error).split("\n    ")[0].split())


def _explain(schema: type[BaseModel], detail: dict[str, Any]) -> str:
    """One clear sentence for one of pydantic's error records."""
    # pydantic names the member of a union it tried, as in "list[str]": that is no key of ours.
    key = ".".join(str(part) for part in detail["loc"] if "[" not in str(part))
    if detail["type"] == "extra_forbidden":
        known = [known for known, _ in _fields(schema)]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"unknown key '{key}'; did you mean '{close[0]}'?"
    if detail["type"] == "missing":
        return f"{key} must be given"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict) or _holds_secrets(schema, key):
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]} (got {detail['input']!r})"


def _holds_secrets(schema: type[BaseModel], key: str) -> bool:
    """Whether what stands at ``key``, or within it, is never written, and so not to be shown either."""
    secret = (hidden for hidden, field in _fields(schema) if field.exclude)
    return any(f"{key}.".startswith(f"{hidden}.") or f"{hidden}.".startswith(f"{key}.") for hidden in secret)


def _fields(schema: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, FieldInfo]]:
    """Every dotted key that ``schema`` knows, and what it is."""
    for name, field in schema.model_fields.items():
        key = prefix + (field.alias or name)
        yield key, field
        for inner in _section_types(field.annotation):
            yield from _fields(inner, f"{key}.")


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for option in typing.get_args(annotation) for inner in _section_types(option)]
    return []
