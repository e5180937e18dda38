"""The CPU tier: texts in, one flat batch of token ids out."""
