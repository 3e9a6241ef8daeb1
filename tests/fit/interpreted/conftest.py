"""These tests are collected only where triton will interpret: see tests/test_interpreted.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
