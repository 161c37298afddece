"""Errors of the codec, each a `CodecError`, so that one `except` takes them all."""

__all__ = [
    "CodecError",
    "CorruptFileError",
    "MachineMismatchError",
    "ModelMismatchError",
    "NotACodecFileError",
    "TruncatedFileError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
]


class CodecError(ValueError):
    """Error of lossless compression; base class of the others."""


class UnsupportedModelError(CodecError):
    """A VAE that cannot be run in exact integer arithmetic, or whose likelihood has no finite tables."""


class NotACodecFileError(CodecError):
    """A file that does not begin like a compressed file."""


class UnsupportedVersionError(CodecError):
    """A compressed file of another version of the format."""


class ModelMismatchError(CodecError):
    """A file compressed by another model, or with other settings."""


class MachineMismatchError(ModelMismatchError):
    """A file in float64 compressed on a machine whose networks may give other bits."""


class TruncatedFileError(CodecError):
    """A compressed file whose end is missing."""


class CorruptFileError(CodecError):
    """A damaged part of a compressed file, which the message names."""
