"""Modules of hyperparameters as JSON, and back to equal modules.

A module becomes its class's qualified name and its fields, so `settings.json` is readable and complete.
Reading it constructs classes of eqgen only: nothing in a file can make Python import or call anything else.
"""

import dataclasses
import importlib
import math
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import equinox as eqx


Built = TypeVar("Built")
_UNION = type(int | str)
DEEPEST = 50
"""Modules within modules, or lists within lists; what is deeper is no hyperparameter."""


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

    **Raises:** `HyperparametersError` when a class or a field does not exist in this version, or a value is not of
    its field's type.
    """
    return _from_json(content, DEEPEST)


def _from_json(content, depth):
    if depth == 0:
        raise HyperparametersError(f"it is nested more than {DEEPEST} deep.")
    if isinstance(content, list):
        return tuple(_from_json(item, depth - 1) for item in content)
    if not isinstance(content, dict):
        return content
    cls = _find(content.get("class"))
    if not isinstance(fields := content.get("fields", {}), dict):
        raise HyperparametersError(f"the fields of {cls.__name__} are {fields!r}, no object.")
    given = {name: _from_json(value, depth - 1) for name, value in fields.items()}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := given.keys() - known:
        raise HyperparametersError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))} in this version."
        )
    if missing := known - given.keys():
        warnings.warn(
            f"{cls.__name__}: no {', '.join(sorted(missing))} in the file; taking defaults.", stacklevel=2
        )
    return build(cls, given)


def build(cls: type[Built], fields: Mapping[str, Any]) -> Built:
    """The module or dataclass with these fields.

    **Raises:** `HyperparametersError` when a value is not of the type that its field is annotated with, or the
    class does not accept it.
    """
    for name, value in fields.items():
        check_type(cls, name, value)
    try:
        return cls(**fields)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise HyperparametersError(f"{cls.__name__} does not accept these fields: {error}") from error


def check_type(cls: type, name: str, value: Any) -> None:
    """**Raises:** `HyperparametersError` when the class annotates the field of that name with another type."""
    hints = get_type_hints(cls)
    if name in hints and not _fits(value, hints[name]):
        shown = (
            hints[name].__name__ if isinstance(hints[name], type) else str(hints[name]).replace("typing.", "")
        )
        raise HyperparametersError(f"{cls.__name__}.{name} is {reprlib.repr(value)}; {shown} is needed.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether something read from a file is of the type of an annotation; of those that no file can hold, yes."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, _UNION):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[1:] == (...,):
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return not math.isnan(value) if type(value) is float else type(value) is int and abs(value) < 2**1023
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    if isinstance(hint, type) and issubclass(hint, eqx.Module):
        return isinstance(value, hint)
    return True


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
