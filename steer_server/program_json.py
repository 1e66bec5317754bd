"""Programs as JSON: between the processes of vLLM, and from clients of plain vLLM in `vllm_xargs`.

    {"edits": [{"dictionary": "d", "feature": 3, "clamp": {"value": 2.0, "unit": "max_activation_multiple"},
                "scope": {"generated": false, "windows": [[1, -4]]}, "when": {"dictionary": "d", "feature": 9}}],
     "read_outs": [{"dictionary": "d", "top_k": 8}], "max_relative_size": 0.5, "oversize": "clamp"}

A missing value is the default of `Program`'s classes; an unknown one is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from steer_server.dictionary.edits import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Limit,
    Patch,
    Scale,
)
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryNotFound, InvalidRequest
from steer_server.program import (
    EVERYWHERE,
    Condition,
    FeatureEdit,
    Oversize,
    Program,
    ReadOut,
    Scope,
)
from steer_server.units import Unit, finite, in_activations

KINDS = ("ablate", "clamp", "scale", "add", "limit", "patch")
Dictionaries = Mapping[str, StoredDictionary]
_EDIT_KEYS = {"dictionary", "feature", "scope", "when", *KINDS}


def to_json(program: Program) -> dict[str, Any]:
    """`program` in plain values; whatever has its default is left out."""
    found: dict[str, Any] = {
        "edits": [_edit_to_json(entry) for entry in program.edits],
        "read_outs": [_plain(entry) for entry in program.read_outs],
    }
    if program.max_relative_size is not None:
        found["max_relative_size"] = program.max_relative_size
    if program.oversize is not Oversize.REJECT:
        found["oversize"] = program.oversize
    return found


def from_json(content: Any, dictionaries: Dictionaries | None = None) -> Program:
    """The program in `content`; InvalidRequest names the path of what is wrong with it.

    `dictionaries` give units their meaning; without them there are activations and shares of the norm only.
    """
    table = _object(content, "", {item.name for item in fields(Program)})
    limit = table.get("max_relative_size")
    oversize = table.get("oversize", Oversize.REJECT)
    if oversize not in list(Oversize):
        raise InvalidRequest(f"{oversize!r} is not one of {', '.join(Oversize)}", field="oversize")
    return Program(
        tuple(
            _edit(entry, f"edits[{index}]", dictionaries)
            for index, entry in enumerate(_list(table.get("edits", []), "edits"))
        ),
        tuple(
            _read_out(entry, f"read_outs[{index}]")
            for index, entry in enumerate(_list(table.get("read_outs", []), "read_outs"))
        ),
        None if limit is None else _number(limit, "max_relative_size"),
        Oversize(oversize),
    )


def _edit_to_json(entry: FeatureEdit) -> dict[str, Any]:
    edit = entry.edit
    kind, value = _WRITTEN[type(edit)](edit)
    found: dict[str, Any] = {"dictionary": entry.dictionary, "feature": edit.feature, kind: value}
    if entry.scope is not EVERYWHERE and entry.scope != EVERYWHERE:
        found["scope"] = _plain(entry.scope)
    if entry.when is not None:
        found["when"] = _plain(entry.when)
    return found


def _bounds(edit: Limit) -> dict[str, Any]:
    found = _plain(edit)
    del found["feature"]
    return found


_WRITTEN: dict[type[Edit], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    Ablate: lambda edit: ("ablate", {}),
    Clamp: lambda edit: ("clamp", {"value": edit.value}),
    Scale: lambda edit: ("scale", {"factor": edit.factor}),
    Add: lambda edit: ("add", {"value": edit.value}),
    AddRelative: lambda edit: ("add", {"value": edit.share, "unit": Unit.RELATIVE_NORM.value}),
    Limit: lambda edit: ("limit", _bounds(edit)),
    Patch: lambda edit: ("patch", {"values": [list(pair) for pair in edit.values]}),
}


def _plain(entry: Any) -> dict[str, Any]:
    """A flat dataclass without what has its default."""
    found = {}
    for name, default in _defaults(type(entry)):
        value = getattr(entry, name)
        if value != default:
            if isinstance(value, frozenset):
                value = sorted(value)
            elif isinstance(value, tuple):
                value = [list(part) if isinstance(part, tuple) else part for part in value]
            found[name] = value
    return found


@cache
def _defaults(kind: type[Any]) -> list[tuple[str, Any]]:
    """The fields of a dataclass by name; without a default MISSING, which equals nothing."""
    return [(item.name, item.default) for item in fields(kind)]


def _edit(content: Any, path: str, dictionaries: Dictionaries | None) -> FeatureEdit:
    table = _object(content, path, _EDIT_KEYS)
    name = _text(table, "dictionary", path)
    feature = _whole(_required(table, "feature", path), f"{path}.feature")
    kinds = [kind for kind in KINDS if kind in table]
    if len(kinds) != 1:
        raise InvalidRequest(f"set one of {', '.join(KINDS)}; {len(kinds)} are set", field=path)
    kind = kinds[0]

    def amount(table: Mapping[str, Any], key: str, where: str) -> float:
        return _amount(table, key, where, name, feature, dictionaries)

    edit = _KINDS[kind](feature, table[kind], f"{path}.{kind}", amount)
    scope = _scope(table["scope"], f"{path}.scope") if "scope" in table else EVERYWHERE
    when = _condition(table["when"], f"{path}.when") if "when" in table else None
    return FeatureEdit(name, edit, scope, when)


_Amount = Callable[[Mapping[str, Any], str, str], float]


def _ablate(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    _object(content, path, set())
    return Ablate(feature)


def _clamp(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    return Clamp(feature, amount(_object(content, path, {"value", "unit"}), "value", path))


def _scale(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    table = _object(content, path, {"factor"})
    return Scale(feature, _number(_required(table, "factor", path), f"{path}.factor"))


def _add(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    table = _object(content, path, {"value", "unit"})
    if table.get("unit") == Unit.RELATIVE_NORM:
        return AddRelative(feature, _number(_required(table, "value", path), f"{path}.value"))
    return Add(feature, amount(table, "value", path))


def _limit(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    table = _object(content, path, {"low", "high", "unit"})
    ends = {key: amount(table, key, path) for key in ("low", "high") if key in table}
    limit = Limit(feature, **ends)
    if not ends or limit.low > limit.high:
        raise InvalidRequest("set low, high or both, low not above high", field=path)
    return limit


def _patch(feature: int, content: Any, path: str, amount: _Amount) -> Edit:
    table = _object(content, path, {"values", "unit"})
    values = {}
    for index, pair in enumerate(_list(_required(table, "values", path), f"{path}.values")):
        where = f"{path}.values[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidRequest(f"{pair!r} is not a position and an activation", field=where)
        position = _whole(pair[0], where)
        if position in values:
            raise InvalidRequest(f"position {position} comes twice", field=where)
        values[position] = amount({**table, "value": pair[1]}, "value", path)
    if not values:
        raise InvalidRequest("is empty", field=f"{path}.values")
    return Patch(feature, tuple(values.items()))


_KINDS = {
    "ablate": _ablate,
    "clamp": _clamp,
    "scale": _scale,
    "add": _add,
    "limit": _limit,
    "patch": _patch,
}


def _amount(
    table: Mapping[str, Any],
    key: str,
    path: str,
    name: str,
    feature: int,
    dictionaries: Dictionaries | None,
) -> float:
    value = _number(_required(table, key, path), f"{path}.{key}")
    unit = table.get("unit", Unit.ACTIVATION)
    if unit not in list(Unit):
        raise InvalidRequest(f"{unit!r} is not one of {', '.join(Unit)}", field=f"{path}.unit")
    if unit == Unit.ACTIVATION:
        return value
    if dictionaries is None or name not in dictionaries:
        raise DictionaryNotFound(
            f"no dictionary {name!r} is resident to say what {unit} is", name=name, field=path
        )
    stored = dictionaries[name]
    if not 0 <= feature < stored.card.n_features:
        raise InvalidRequest(f"feature {feature} is not in the dictionary", field=path)
    return in_activations(value, Unit(unit), stored, feature, field=path, name=key)


def _scope(content: Any, path: str) -> Scope:
    table = dict(_object(content, path, {item.name for item in fields(Scope)}))
    for key in ("prompt", "generated"):
        if key in table:
            _truth(table[key], f"{path}.{key}")
    for key in ("positions", "token_ids", "exclude_positions", "exclude_token_ids"):
        if key in table:
            numbers = _list(table[key], f"{path}.{key}")
            table[key] = frozenset(
                _whole(number, f"{path}.{key}[{index}]") for index, number in enumerate(numbers)
            )
    if "windows" in table:
        windows = _list(table["windows"], f"{path}.windows")
        table["windows"] = tuple(
            _window(window, f"{path}.windows[{index}]") for index, window in enumerate(windows)
        )
    return Scope(**table)


def _window(content: Any, path: str) -> tuple[int, int | None]:
    if not isinstance(content, list | tuple) or len(content) != 2:
        raise InvalidRequest(f"{content!r} is not a first and an end position", field=path)
    end = None if content[1] is None else _whole(content[1], path)
    return _whole(content[0], path), end


def _condition(content: Any, path: str) -> Condition:
    table = _object(content, path, {"dictionary", "feature", "above"})
    return Condition(
        _text(table, "dictionary", path),
        _whole(_required(table, "feature", path), f"{path}.feature"),
        _number(table.get("above", 0.0), f"{path}.above"),
    )


def _read_out(content: Any, path: str) -> ReadOut:
    table = dict(_object(content, path, {item.name for item in fields(ReadOut)}))
    _text(table, "dictionary", path)
    for key in ("prompt", "generated", "edited", "complete"):
        if key in table:
            _truth(table[key], f"{path}.{key}")
    for key in ("top_k", "row_bytes"):
        if key in table:
            _whole(table[key], f"{path}.{key}")
    if table.get("above") is not None:
        _number(table["above"], f"{path}.above")
    if "features" in table:
        numbers = _list(table["features"], f"{path}.features")
        table["features"] = tuple(_whole(number, f"{path}.features") for number in numbers)
    return ReadOut(**table)


def _object(content: Any, path: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise InvalidRequest(f"{content!r} is not an object", field=path)
    unknown = content.keys() - known
    if unknown:
        raise InvalidRequest(
            f"has no {min(unknown)!r}; it takes {', '.join(sorted(known)) or 'nothing'}", field=path
        )
    return content


def _list(content: Any, path: str) -> list[Any]:
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{content!r} is not a list", field=path)
    return list(content)


def _required(table: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in table:
        raise InvalidRequest("required", field=f"{path}.{key}")
    return table[key]


def _text(table: Mapping[str, Any], key: str, path: str) -> str:
    value = _required(table, key, path)
    if not isinstance(value, str):
        raise InvalidRequest(f"{value!r} is not a text", field=f"{path}.{key}")
    return value


def _whole(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{value!r} is not a whole number", field=path)
    if not -(2**31) <= value < 2**31:
        raise InvalidRequest("is not a number of 32 bits", field=path)
    return value


def _number(value: Any, path: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidRequest(f"{value!r} is not a number", field=path)
    try:
        return finite(float(value), field=path)
    except OverflowError as error:
        raise InvalidRequest("is too large", field=path) from error


def _truth(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{value!r} is neither true nor false", field=path)
