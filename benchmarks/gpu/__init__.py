"""The parts of `benchmarks/gpu_report.py`: its stages, how one runs, and how its output is read."""
