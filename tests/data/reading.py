"""What the tests of sources do with one."""

import pytest

from t5x_lite.errors import UserError


def read(source):
    """All records with their places, and the errors of what was skipped."""
    errors = []

    def on_broken(error):
        if source.broken == "error":
            raise error
        errors.append(str(error))

    found = [pair for part in source.parts() for pair in source.records(part, on_broken)]
    return found, errors


def records(source):
    return [record for record, _ in read(source)[0]]


def refusal(source):
    """The one line of what a source is refused for."""
    with pytest.raises(UserError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
