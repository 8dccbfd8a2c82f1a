"""Prints what a wheel requires, without packages whose names are given: requirements.py WHEEL [NAME ...]."""

from __future__ import annotations

import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
for line in lines:
    requirement = line.removeprefix("Requires-Dist: ")
    name = re.split(r"[^\w.-]", requirement)[0]
    if requirement != line and "extra ==" not in line and name not in sys.argv[2:]:
        print(requirement)
