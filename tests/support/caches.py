"""Imported before any library of Hugging Face reads its environment: this process of pytest has its own HF_HOME.

Two of them side by side (`pytest -n`) never copy remote code or a data set into one folder, nothing of the user's is
seen, and nothing stays. The processes that a test starts inherit it."""

import os
import tempfile

FOLDER = tempfile.TemporaryDirectory(prefix="gcl-tests-")
os.environ["HF_HOME"] = FOLDER.name
