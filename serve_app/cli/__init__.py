"""The console script `serve-app`: what is done to an application from outside it."""
