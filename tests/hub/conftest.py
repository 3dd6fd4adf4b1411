"""The comparison with published models, for the tests here."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def ours():
    spec = importlib.util.spec_from_file_location(
        "ours", pathlib.Path(__file__).with_name("ours.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
