"""This package's expert kernels inside models of other libraries."""
