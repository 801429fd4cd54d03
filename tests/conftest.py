"""Hypothesis draws the same short set of programs every time; `--long` is for tests that are worth hours."""

import pytest
from hypothesis import HealthCheck, settings

import programs

common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", derandomize=True, database=None, max_examples=150, **common)
settings.register_profile("long", max_examples=100_000, **common)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the long form of the tests that have one: hours, not minutes")


def pytest_configure(config):
    if config.getoption("--long"):
        settings.load_profile("long")


@pytest.fixture
def long(request):
    """Is the long form of this test wanted?"""
    return request.config.getoption("--long")


def pytest_terminal_summary(terminalreporter):
    if programs.counts["drawn"]:
        drawn, kinks = programs.counts["drawn"], programs.counts["kinks"]
        terminalreporter.write_line(
            f"random programs: {drawn} drawn, {kinks} ({kinks / drawn:.1%}) discarded at a kink"
        )
