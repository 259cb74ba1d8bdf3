//! Says which instructions the kernels use on this machine, or at the level that `PMETAL_CPU_LEVEL` names.

fn main() {
    println!("{}", pmetal_cpu::Level::current());
}
