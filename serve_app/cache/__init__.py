"""Model files on every node: resolved to a pinned list, fetched once, verified, published by one rename."""
