"""The HTTP edge, and the deployment behind it."""
