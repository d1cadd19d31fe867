"""Every study by name. Importing this needs no torch, so that ``kimi-linear study`` answers at once."""

from __future__ import annotations

from typing import Any

from kimi_linear.studies import mqar, nano, synthetic
from kimi_linear.studies.study import Study

STUDIES: dict[str, Study[Any]] = {study.name: study for study in (mqar.STUDY, synthetic.STUDY, nano.STUDY)}
