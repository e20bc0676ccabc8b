"""What the tests of constrained decoding share."""

import pytest

from rollouts.call_constraint import CallConstraint


@pytest.fixture(scope="session")
def constraint(awkward_dialogue, awkward_catalog):
    """All models of the awkward catalogue."""
    return CallConstraint.of_models(awkward_dialogue, awkward_catalog.values())
