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


def pytest_terminal_summary(terminalreporter, config):
    if programs.counts["drawn"]:
        drawn, kinks = programs.counts["drawn"], programs.counts["kinks"]
        terminalreporter.write_line(
            f"random programs: {drawn} drawn, {kinks} ({kinks / drawn:.1%}) discarded at a kink"
        )
    passed = [(r.nodeid, dict(r.user_properties)) for r in terminalreporter.stats.get("passed", [])]
    errors = [(nodeid.partition("[")[2][:-1], found["errors"]) for nodeid, found in passed if "errors" in found]
    if errors and config.get_verbosity() > 0:
        terminalreporter.section("largest error of the derivatives, relative; allowed 1e-06")
        terminalreporter.write_line(f"{'op, shapes of its inputs, domain':60}   order 1  order 2  order 3")
        for name, by_order in errors:
            name = name.encode().decode("unicode_escape")  # pytest's names are ASCII
            terminalreporter.write_line(f"{name:60}" + "".join(f"{error:9.0e}" for error in by_order))
