"""Imports torch-fidelity first of all: without it these tests must fail, not be skipped."""

import peer  # noqa: F401
