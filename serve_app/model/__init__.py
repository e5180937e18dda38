"""The engine: a queue bounded in tokens, padding-free forwards, recovery. Runs without Ray, but for deployment.py."""
