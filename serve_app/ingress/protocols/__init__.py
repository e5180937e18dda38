"""One module for each wire protocol: its bodies, its answers, the shape of its errors. None knows another."""
