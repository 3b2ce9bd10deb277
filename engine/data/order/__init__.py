"""The order of samples as pure functions: permutation, mixture of sources, and addresses of samples."""
