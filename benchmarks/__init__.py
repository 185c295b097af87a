"""Programs that measure: ``python -m benchmarks NAME``. They are no part of the tests."""
