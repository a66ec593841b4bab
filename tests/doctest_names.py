"""The names that every doctest may use."""

import pytest
import torch

import funcnet


@pytest.fixture(autouse=True)
def names(doctest_namespace):
    doctest_namespace["torch"] = torch
    doctest_namespace["fn"] = funcnet
