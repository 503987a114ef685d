"""`make fuzz` fails as well if it proves nothing; .ci/run runs it."""

import json
from collections import Counter

import pytest

from tests.contract.fuzz import CALLERS, unproven
from tests.harness import ROOT

OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in json.loads((ROOT / "openapi.json").read_text())["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


@pytest.mark.parametrize("caller", CALLERS)
def test_operations_that_never_did_what_they_are_for_are_named(caller: str) -> None:
    assert unproven(caller, Counter()) == list(OPERATIONS)
    assert unproven(caller, Counter(dict.fromkeys([(label, 404) for label in OPERATIONS], 9))) == list(OPERATIONS)
    refused = Counter(dict.fromkeys([(label, 401) for label in OPERATIONS], 1))
    served = Counter(dict.fromkeys([(label, 200) for label in OPERATIONS], 1))
    assert unproven(caller, refused + served) == []
    public = {label for label, operation in OPERATIONS.items() if not operation["security"]}
    administrative = {
        label for label, operation in OPERATIONS.items() if {"administration", "metrics"} & set(operation["tags"])
    }
    assert public
    assert administrative
    to_be_refused = {"nobody": OPERATIONS.keys() - public, "user": administrative, "administrator": set()}[caller]
    assert set(unproven(caller, served)) == to_be_refused
    assert set(unproven(caller, refused)) == OPERATIONS.keys() - to_be_refused
