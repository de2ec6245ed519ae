//! Panics of libraries that read foreign bytes, turned into errors.
//!
//! A parser that asserts on damaged input would end the program, and the standard hook would print
//! a message and a backtrace before anyone can catch it. [`quietly`] does both: it catches, and it
//! keeps the hook silent for the calling thread alone, so that a panic elsewhere is still printed.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use crate::outside_name::shown;

/// A library may repeat what it read.
const SHOWN_CHARACTERS: usize = 160;

thread_local! {
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// The panic message of a library, cut short and on one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PanicMessage(String);

impl fmt::Display for PanicMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PanicMessage {}

/// Runs `work`; a panic becomes an error with its message, and nothing is printed.
///
/// Only for calls into libraries: discard whatever `work` changed before a panic. Only
/// panics on the calling thread are caught silently; calls may be nested.
///
/// ```
/// let said = gptq_types::quietly(|| -> u32 { panic!("no such {}", "column") }).unwrap_err();
/// assert_eq!(said.to_string(), "no such column");
/// ```
pub fn quietly<R>(work: impl FnOnce() -> R) -> Result<R, PanicMessage> {
    silence_quiet_threads();
    let _quiet = Quiet::begin();
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or(panic.downcast_ref::<&str>().copied());
        PanicMessage(shown(
            said.unwrap_or("a panic without a message"),
            SHOWN_CHARACTERS,
        ))
    })
}

/// Puts one hook before the one that is there; it never takes it away, since threads that are in
/// [`quietly`] at that moment would lose it.
fn silence_quiet_threads() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            // a thread whose locals are gone is in nobody's `quietly`
            if !IS_QUIET.try_with(Cell::get).unwrap_or(false) {
                before(info);
            }
        }));
    });
}

/// Restores the flag on every way out, so that an outer call stays quiet.
struct Quiet {
    was: bool,
}

impl Quiet {
    fn begin() -> Self {
        Quiet {
            was: IS_QUIET.replace(true),
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        IS_QUIET.set(self.was);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_comes_back_as_its_words_and_a_result_as_itself() {
        assert_eq!(quietly(|| 3), Ok(3));
        let error = quietly(|| -> () { panic!("row {}\nis odd", 7) }).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
        assert!(error.to_string().starts_with("row 7"), "{error}");
        let error = quietly(|| -> () { std::panic::panic_any(5u8) }).unwrap_err();
        assert_eq!(error.to_string(), "a panic without a message");
        let long = quietly(|| -> () { panic!("{}", "x".repeat(100_000)) }).unwrap_err();
        assert!(long.to_string().len() <= 250);
    }

    #[test]
    fn the_flag_is_of_one_thread_and_falls_at_the_end() {
        assert!(!IS_QUIET.get());
        let inside = quietly(|| {
            let _ = quietly(|| -> () { panic!("inner") });
            let elsewhere = std::thread::spawn(|| IS_QUIET.get()).join().unwrap();
            (IS_QUIET.get(), elsewhere)
        });
        assert_eq!(inside, Ok((true, false)));
        let _ = quietly(|| -> () { panic!("outer") });
        assert!(!IS_QUIET.get());
    }
}
