"""Environments of clients' own, in their newest version that is tested and in an older one.

`python -m tests.clients.environments` makes all that are not there yet; tests make what they need. They lie in a folder
of the system for temporary files (or where SERVE_APP_TEST_CLIENTS says), each under a name that says what is in it, and
may be thrown away.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    "new": (
        "langchain-openai==1.7.4",
        "langchain-huggingface==1.2.3",
        "langchain-cohere==0.6.0",
        "llama-index-core==0.14.25",
        "llama-index-embeddings-openai-like==0.4.0",
        "llama-index-embeddings-text-embeddings-inference==0.6.0",
        "llama-index-postprocessor-tei-rerank==0.6.0",
        "llama-index-llms-openai-like==0.8.1",
        "haystack-ai==3.4.1",
        "huggingface-api-haystack==3.1.0",
        "litellm==1.110.2",
    ),
    "old": (
        "langchain-openai==0.3.35",
        "langchain-huggingface==0.3.1",
        "langchain-cohere==0.4.6",
        "llama-index-core==0.12.52",
        "llama-index-embeddings-openai-like==0.1.1",
        "llama-index-embeddings-text-embeddings-inference==0.3.2",
        "llama-index-postprocessor-tei-rerank==0.3.0",
        "llama-index-llms-openai-like==0.4.0",
        "haystack-ai==2.20.0",
        "litellm==1.75.0",
        # So that pip need not try many versions of these.
        "huggingface_hub==0.36.2",
        "langchain-core==0.3.86",
        "langchain-community==0.3.31",
        "transformers==4.57.6",
        "cohere==5.21.1",
        "openai==1.109.1",
    ),
    "new-own": ("cohere==7.3.1", "openai==3.57.0", "huggingface_hub==2.4.0", "numpy", "grpcio-health-checking==1.85.1"),
    "old-own": (
        "cohere==5.5.8",
        "openai==1.40.0",
        "huggingface_hub==0.28.1",
        "tritonclient[http]==2.50.0",
        "httpx<0.28",
        "aiohttp",
    ),
    "older-own": ("huggingface_hub==0.23.4", "numpy", "aiohttp"),
    "new-chroma": ("chromadb==1.5.9", "openai"),
    "old-chroma": ("chromadb==1.0.21", "openai<2"),
    "new-kserve": ("kserve==0.21.0",),
    "old-kserve": ("kserve==0.15.2", "setuptools<80"),
    "new-mlserver": ("mlserver==1.7.1",),
    "old-mlserver": ("mlserver==1.6.1",),
}
"""What is asked of pip, by environment. None of it needs torch."""


def folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"serve-app-clients-{os.getuid()}"
    return Path(os.environ.get("SERVE_APP_TEST_CLIENTS", default))


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made unless it is there. Raises CalledProcessError."""
    wanted = ENVIRONMENTS[name]
    content = hashlib.sha256(" ".join((sys.version, *wanted)).encode()).hexdigest()[:12]
    made = folder() / f"{name}-{content}"
    if not made.exists():
        making = made.with_suffix(f".{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", making], check=True)
        install = (making / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        subprocess.run([*install, *wanted], check=True)
        making.rename(made)  # its interpreter is found there; the scripts beside it are not, and nobody needs them
    return made / "bin" / "python"


if __name__ == "__main__":
    for each in ENVIRONMENTS:
        print(each, python_of(each), flush=True)
