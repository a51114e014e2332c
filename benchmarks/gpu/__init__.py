"""The parts of ``benchmarks/gpu.sh``: what ten minutes of a GPU are spent on."""
