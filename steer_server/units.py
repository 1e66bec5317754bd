"""What the number of a strength counts."""

import math
from enum import StrEnum

from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryMismatch, InvalidRequest

_FLOAT32_MAX = 3.4028234663852886e38


class Unit(StrEnum):
    """Every strength names its unit."""

    ACTIVATION = "activation"
    """The feature's activation, as a read-out returns it."""
    MAX_ACTIVATION_MULTIPLE = "max_activation_multiple"
    """Multiples of the feature's largest activation in its training text."""
    RELATIVE_NORM = "relative_norm"
    """Length of the change over the length of x, at each token; for adding only."""
    DECODER_COEFFICIENT = "decoder_coefficient"
    """Multiples of the decoder row as stored."""


def in_activations(
    value: float,
    unit: Unit,
    stored: StoredDictionary,
    feature: int,
    *,
    field: str,
    name: str = "value",
) -> float:
    """`value` of `unit` as an activation of the feature; InvalidRequest if no float32 holds it.

    `field` is the path of what holds the number, under `name`, and its unit.
    RELATIVE_NORM depends on the token, so it is InvalidRequest here; DictionaryMismatch if the dictionary knows no
    largest activation of the feature.
    """
    value = finite(value, field=f"{field}.{name}")
    match unit:
        case Unit.ACTIVATION:
            return value
        case Unit.MAX_ACTIVATION_MULTIPLE:
            largest = float(stored.statistics.max[feature])
            if largest <= 0:
                raise DictionaryMismatch(
                    f"feature {feature} of {stored.card.name!r} never fired in its training text, so "
                    "it has no largest activation; use the unit ACTIVATION",
                    field=f"{field}.unit",
                )
            return finite(value * largest, field=f"{field}.{name}")
        case Unit.DECODER_COEFFICIENT:
            # x gains (f' - f) W_dec / input_scale; the coefficient counts W_dec as stored.
            return finite(value * stored.card.input_scale, field=f"{field}.{name}")
        case Unit.RELATIVE_NORM:
            raise InvalidRequest("RELATIVE_NORM has no meaning here", field=f"{field}.unit")


def finite(value: float, *, field: str) -> float:
    """`value`, if a float32 holds it."""
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        raise InvalidRequest(f"{value} is not a finite float32", field=field)
    return value
