"""The embedded example: small worlds drawn from a seed, and a tiny model for them."""
