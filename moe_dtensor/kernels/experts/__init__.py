"""The expert MLP: sort tokens by expert, permute, grouped GEMMs, unpermute."""
