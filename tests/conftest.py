import os

from hypothesis import HealthCheck, settings

import programs

# Deterministic and short by default; `pytest --hypothesis-profile soak tests/test_programs.py` draws new ones for long.
common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", derandomize=True, database=None, max_examples=150, **common)
settings.register_profile("soak", max_examples=int(os.environ.get("SOAK_EXAMPLES", 20000)), **common)
settings.load_profile("default")


def pytest_terminal_summary(terminalreporter):
    if programs.counts["drawn"]:
        drawn, kinks = programs.counts["drawn"], programs.counts["kinks"]
        terminalreporter.write_line(
            f"random programs: {drawn} drawn, {kinks} ({kinks / drawn:.1%}) discarded at a kink"
        )
