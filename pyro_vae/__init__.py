"""pyro_vae."""
