"""Build of `qat`: what is declarative is in pyproject.toml, what has to be computed belongs here."""

from __future__ import annotations

from setuptools import setup

setup()
