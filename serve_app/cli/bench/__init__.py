"""Measuring a running server: the same texts, in the same run, against what the hardware does without a server."""
