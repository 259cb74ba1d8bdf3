use std::{
    fmt::Display,
    io::{self, Write},
};

/// Prints a line to stderr. Where nobody reads it any more (a closed pipe), the work goes on: `eprintln!` would panic and lose it.
pub fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
