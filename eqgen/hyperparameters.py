"""Modules of hyperparameters as JSON, and back to equal modules.

A module becomes its class's qualified name and its fields, so `settings.json` is readable and complete.
Reading it constructs classes of eqgen only: nothing in a file can make Python import or call anything else.
"""

import dataclasses
import importlib
import warnings
from typing import Any

import equinox as eqx


class HyperparametersError(Exception):
    """Something has no exact form in JSON, or a form that this version of eqgen does not know."""


def to_json(value: Any) -> Any:
    """`value` as JSON can hold it: a module as `{"class": ..., "fields": {...}}`, a tuple as a list.

    **Raises:** `HyperparametersError` for anything but modules of eqgen, tuples, numbers, strings, booleans
    and None.
    """
    if isinstance(value, eqx.Module) and _is_ours(type(value)):
        fields = {}
        for field in dataclasses.fields(value):
            try:
                fields[field.name] = to_json(getattr(value, field.name))
            except HyperparametersError as error:
                raise HyperparametersError(f"{type(value).__name__}.{field.name}: {error}") from None
        return {"class": f"{type(value).__module__}.{type(value).__name__}", "fields": fields}
    if isinstance(value, tuple) and type(value) is tuple:
        return [to_json(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise HyperparametersError(
        f"a {type(value).__name__} has no exact form in JSON. Use modules of eqgen, tuples, numbers, strings."
    )


def from_json(content: Any) -> Any:
    """What `to_json` was given. A field that the file lacks, being newer, gets its default and a warning.

    **Raises:** `HyperparametersError` when a class or a field does not exist in this version.
    """
    if isinstance(content, list):
        return tuple(from_json(item) for item in content)
    if not isinstance(content, dict):
        return content
    cls = _find(content.get("class"))
    given = {name: from_json(value) for name, value in content.get("fields", {}).items()}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := given.keys() - known:
        raise HyperparametersError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))} in this version."
        )
    if missing := known - given.keys():
        warnings.warn(
            f"{cls.__name__}: no {', '.join(sorted(missing))} in the file; taking defaults.", stacklevel=2
        )
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise HyperparametersError(f"{cls.__name__} does not accept these fields: {error}") from error


def _is_ours(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, eqx.Module) and cls.__module__.split(".")[0] == "eqgen"


def _find(name: Any) -> type[eqx.Module]:
    module, _, attribute = str(name).rpartition(".")
    if module.split(".")[0] == "eqgen":
        try:
            cls: Any = vars(importlib.import_module(module)).get(attribute)
        except ImportError:
            cls = None
        if _is_ours(cls) and cls.__module__ == module:
            return cls
    raise HyperparametersError(f"{name!r} is not a module of this version of eqgen.")
