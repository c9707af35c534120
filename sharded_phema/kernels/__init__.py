"""The update of several running averages from one set of weights, one implementation a file."""
