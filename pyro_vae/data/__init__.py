"""Image data sets, held as 8-bit grey levels and binarised on the way, and minibatches of them."""

from pyro_vae.data.datasets import DataNotFoundError, load
from pyro_vae.data.images import DataError, Images, from_array

__all__ = ["DataError", "DataNotFoundError", "Images", "from_array", "load"]
