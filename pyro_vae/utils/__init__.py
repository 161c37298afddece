"""Utilities independent of models: argument checks, side-effect isolation, files, text output."""
