//! Generators and comparers for tests of any backend.
