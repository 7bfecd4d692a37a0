"""The tests, and the tools they are made of: a wing for each part of the project. CONTRIBUTING.md has the map."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
