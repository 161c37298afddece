"""A VAE for a table of mixed columns, with the families and the units that the table proposes."""

from collections.abc import Sequence

from pyro_vae.data import Table
from pyro_vae.guides import DiagonalNormal
from pyro_vae.likelihoods import Columns
from pyro_vae.networks import ColumnEncoder
from pyro_vae.priors import StandardNormal
from pyro_vae.utils.validation import require_count
from pyro_vae.vae import VAE

__all__ = ["table_vae"]


def table_vae(
    table: Table, latent_dim: int, *, hidden_features: Sequence[int] = (128,), activation: str = "relu"
) -> VAE:
    """Build an untrained VAE of float64 for a table: a family for each column, with densities in its units.

    p(z) = N(0, I); p(x|z) is `likelihoods.Columns`; q(z|x) is a diagonal normal from a `ColumnEncoder`, which
    sees where values are missing. Train it by `fit(vae, table.values, missing="nan")`.

    Args:
        table: From `pyro_vae.data.table`.
        latent_dim: K, the number of latent dimensions.
        hidden_features: Widths of the hidden layers of the encoder; of the decoder in reverse.
        activation: As for `networks.MLP`.

    Raises:
        TypeError: If `table` is not a `Table`.
        ValueError: If a number is below 1.

    Example:
        >>> import pandas as pd
        >>> from pyro_vae.data import table
        >>> people = table(pd.DataFrame({"height": [1.7, 1.8, 1.6], "eyes": ["blue", "brown", None]}))
        >>> vae = table_vae(people, latent_dim=2)
        >>> vae.sample(5).shape
        torch.Size([5, 2])
    """
    if not isinstance(table, Table):
        raise TypeError(f"table_vae takes what pyro_vae.data.table returns; got {type(table).__name__}")
    require_count("latent_dim", latent_dim)
    offset = [column.offset for column in table.columns]
    scale = [column.scale for column in table.columns]
    encoder = ColumnEncoder(
        table.families,
        2 * latent_dim,
        offset=offset,
        scale=scale,
        hidden_features=tuple(hidden_features),
        activation=activation,
    )
    likelihood = Columns(
        latent_dim,
        table.families,
        offset=offset,
        scale=scale,
        names=[str(column.name) for column in table.columns],
        hidden_features=tuple(hidden_features)[::-1],
        activation=activation,
    )
    guide = DiagonalNormal((len(table.columns),), latent_dim, network=encoder, mask_input=True)
    return VAE(prior=StandardNormal(latent_dim), likelihood=likelihood, guide=guide).double()
