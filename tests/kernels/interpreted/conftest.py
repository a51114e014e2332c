"""Collected only where Triton interprets its kernels, decided for the whole process: see test_interpreter.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
