"""The documents are OpenAPI 3.1. (.ci/run has Redocly look at them, too.)"""

import json
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from openapi_spec_validator.validation.exceptions import OpenAPIValidationError

from tests.harness import ROOT


def validate(document: Any) -> None:
    OpenAPIV31SpecValidator(document).validate()


@pytest.fixture(params=["openapi.json", "openapi.en.json"])
def document(request: pytest.FixtureRequest) -> Any:
    return json.loads((ROOT / request.param).read_text())


def test_the_document_is_openapi(document: Any) -> None:
    assert document["openapi"].startswith("3.1.")
    validate(document)


def test_an_invalid_document_is_rejected(document: Any) -> None:
    del document["paths"]["/api/v1/orders/{order_id}"]["get"]["parameters"]
    with pytest.raises(OpenAPIValidationError):
        validate(document)
