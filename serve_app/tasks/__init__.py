"""One module per task: prepare (text in), head (on the device), postprocess (answer out)."""
