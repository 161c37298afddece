"""Tools without a model: argument checks, isolation, files, text output."""
