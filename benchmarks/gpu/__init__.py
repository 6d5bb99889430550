"""The parts of `benchmarks/gpu_report.py`: its stages, how one is run, and what is read from its output."""
