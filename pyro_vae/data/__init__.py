"""Data: image sets with binarisation on the way, tables, other sources of rows, minibatches."""

from pyro_vae.data.datasets import DataNotFoundError, load
from pyro_vae.data.images import DataError, Images, from_array
from pyro_vae.data.tables import Table, table

__all__ = ["DataError", "DataNotFoundError", "Images", "Table", "from_array", "load", "table"]
