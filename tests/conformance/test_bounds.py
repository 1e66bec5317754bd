"""Every bound that a comment of the protos states holds on the wire, and the refusal names the field."""

import pytest
from google.rpc import error_details_pb2

from tests.conformance.bounds import AT_BOUNDS, CASES, ENGINE_ONLY
from tests.conformance.cases import Case, Change
from tests.conformance.contract import bounds
from tests.conformance.requests import GOOD, answers, changed
from tests.unit.serving import Serving


def test_every_bound_that_a_comment_states_is_tried():
    tried = {case.bound for case in CASES}

    assert sorted(bounds() - tried - ENGINE_ONLY.keys()) == [], "bounds without a case"
    assert sorted(tried - bounds()) == [], "cases without a bound"
    assert sorted(ENGINE_ONLY.keys() - bounds()) == [], "excuses without a bound"
    assert sorted(ENGINE_ONLY.keys() & tried) == [], "excuses that are none"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
async def test_a_request_past_a_bound_is_refused_by_field(service: Serving, case: Case):
    error = await case.ask(service)

    assert (error.code.name, error.field) == (case.bound[1], case.field), str(error)
    assert error.reason
    assert violated(error.status) == [case.field] * bool(case.field)


@pytest.mark.parametrize(("rpc", "change"), AT_BOUNDS)
async def test_a_request_at_a_bound_is_answered(service: Serving, rpc: str, change: Change):
    assert await answers(service, rpc, changed(GOOD[rpc], change))


def violated(status) -> list[str]:
    """The fields of the status's BadRequest."""
    found = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found += [violation.field for violation in bad.field_violations]
    return found
