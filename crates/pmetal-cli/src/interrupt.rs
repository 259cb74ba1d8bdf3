//! Ctrl-C as a flag.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::tell::tell;

/// Whether Ctrl-C was pressed.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From here on Ctrl-C is noted; pressed once more before that was cleared, it ends the command.
    pub fn install() -> Self {
        let interrupt = Self::default();
        let pressed = interrupt.clone();
        let handler = ctrlc::set_handler(move || {
            if pressed.0.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
        if let Err(e) = handler {
            tell(format_args!("Ctrl-C will end the command at once: {e}"));
        }
        interrupt
    }

    /// Whether it was pressed.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Forgets it.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// As if it were pressed.
    #[cfg(test)]
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
