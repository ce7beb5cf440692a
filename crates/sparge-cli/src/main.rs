//! The `sparge` command.
fn main() {}
