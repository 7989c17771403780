"""Sparsity: which tiles of the score matrix a mask leaves empty, partly visible or fully visible."""
