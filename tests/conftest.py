"""The `kvm` marker, and how hard Hypothesis tries.

MEMLISTENER_REQUIRE_KVM=1
    Tests that need KVM fail where it cannot be used, instead of being skipped.
MEMLISTENER_HYPOTHESIS=dev|ci
    Which profile Hypothesis uses; ``dev`` unless told.
"""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=300, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("MEMLISTENER_HYPOTHESIS", "dev"))


@functools.cache
def why_no_kvm() -> str | None:
    """Why KVM cannot be used here, or None if it can."""
    from memlistener.errors import KvmUnavailableError
    from memlistener.kvm.fds import Kvm

    try:
        Kvm.open().close()
    except KvmUnavailableError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `kvm`, or fail it, where KVM cannot be used."""
    if item.get_closest_marker("kvm") is None:
        return
    reason = why_no_kvm()
    if reason is None:
        return
    if os.environ.get("MEMLISTENER_REQUIRE_KVM") == "1":
        pytest.fail(f"KVM is required, but: {reason}", pytrace=False)
    pytest.skip(f"no KVM: {reason}")
