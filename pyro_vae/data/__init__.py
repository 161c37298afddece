"""Data: image sets with binarisation on the way, other sources of rows, minibatches."""

from pyro_vae.data.datasets import DataNotFoundError, load
from pyro_vae.data.images import DataError, Images, from_array

__all__ = ["DataError", "DataNotFoundError", "Images", "from_array", "load"]
