//! Ctrl-C: the first one ends the text that is being written, the second one the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::flag::{register, register_conditional_shutdown};

use crate::failure::Failure;

/// Exit code of an interrupted program, by shell convention: 128 + the signal number.
pub const EXIT_CODE: u8 = 130;

/// Whether the user has interrupted the text.
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    idle: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on Ctrl-C is heard here.
    pub fn listen() -> Result<Self, Failure> {
        let [asked, idle] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let code = i32::from(EXIT_CODE);
        let cannot = |error| Failure::new(format!("cannot listen for Ctrl-C: {error}"));
        // Handlers run in this order: one that came before ends the program, this one asks.
        register_conditional_shutdown(SIGINT, code, idle.clone()).map_err(cannot)?;
        register_conditional_shutdown(SIGINT, code, asked.clone()).map_err(cannot)?;
        register(SIGINT, asked.clone()).map_err(cannot)?;
        Ok(Interrupt { asked, idle })
    }

    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Runs `wait`, in which Ctrl-C ends the program at once.
    pub fn idle<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.asked.store(false, Ordering::Relaxed);
        self.idle.store(true, Ordering::Relaxed);
        let result = wait();
        self.idle.store(false, Ordering::Relaxed);
        result
    }
}
