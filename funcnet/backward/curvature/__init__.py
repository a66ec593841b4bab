"""Second-order training: Kronecker factors and K-FAC."""
