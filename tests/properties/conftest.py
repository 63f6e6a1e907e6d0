"""How hard the properties are tried: 500 examples each, 20,000 in `make soak`, or as OPSMGR_EXAMPLES says."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from support.figures import scaled

settings.register_profile(
    "opsmgr",
    max_examples=int(os.environ.get("OPSMGR_EXAMPLES", scaled(500, 20_000))),
    deadline=None,
    # CI tries the same examples each time, so that a red run is the change's doing; people's runs go on searching.
    derandomize="CI" in os.environ,
    # A snapshot is large; that the machine is busy is no fault of the test.
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("opsmgr")
