"""The parts of `benchmarks/step_time.py`: cases, providers, counts, ceilings and the report."""
