//! Sparse, quantised attention.
