//! All branches that are missing, on all devices.

use std::cmp::Reverse;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use gptq_model::Device;
use gptq_repository::Repository;
use gptq_types::{Method, PlannedBranch};

use super::branch::{Maker, Shared, publish};
use crate::failure::Failure;

/// Threads that publish, and branches that may wait for them. A branch of several GB takes seconds
/// to hash, on one thread since sha256 is a chain; with a shared Hessian all are finished at once.
const PUBLISHERS: usize = 6;
const WAITING: usize = 1;

/// Each device takes the next branch; threads beside them hash and commit what they finish. A branch that fails is named and left
/// out; how many did.
pub fn make_all(
    missing: &[&PlannedBranch],
    shared: &Shared<'_>,
    devices: &[Device],
) -> Result<usize, Failure> {
    let queue = Mutex::new(large_and_small(missing, |branch| branch.weight_bytes).into_iter());
    let next = || queue.lock().ok().and_then(|mut queue| queue.next());
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WAITING);
        let receiver = Arc::new(Mutex::new(receiver));
        let publishers: Vec<_> = (0..PUBLISHERS.min(missing.len()))
            .map(|_| {
                let receiver = receiver.clone();
                scope.spawn(move || publish_all(&receiver, shared))
            })
            .collect();
        drop(receiver); // publishers that all left with an error must not keep a device waiting
        let workers: Vec<_> = (devices.iter())
            .map(|&device| {
                let (next, sender) = (&next, sender.clone());
                scope.spawn(move || work(device, shared, next, &sender))
            })
            .collect();
        drop(sender);
        let mut failed = 0;
        for thread in workers.into_iter().chain(publishers) {
            failed += match thread.join() {
                Ok(failed) => failed?,
                Err(_) => return Err(Failure::new("a worker of the matrix ended in a panic")),
            };
        }
        Ok(failed)
    })
}

/// Large and small ones by turns, so that devices side by side do not write their largest files at
/// the same time (two of 7 GB took 33 s together and 29 alone while verification was slower; what
/// turns are worth since was not measured apart), and from larger to smaller within each kind, so
/// that little is left to publish at the end.
fn large_and_small<T: Copy>(items: &[T], bytes: impl Fn(T) -> u64) -> Vec<T> {
    let mut sorted = items.to_vec();
    sorted.sort_by_key(|&item| Reverse(bytes(item)));
    let (large, small) = sorted.split_at(sorted.len().div_ceil(2));
    let small = small.iter().map(Some).chain([None]);
    (large.iter().zip(small))
        .flat_map(|(large, small)| [Some(large), small])
        .flatten()
        .copied()
        .collect()
}

fn work<'a>(
    device: Device,
    shared: &Shared<'_>,
    next: &dyn Fn() -> Option<&'a PlannedBranch>,
    finished: &SyncSender<&'a PlannedBranch>,
) -> Result<usize, Failure> {
    let mut maker = Maker::new(shared, device);
    let mut failed = 0;
    while let Some(branch) = next() {
        eprintln!("{}: {}", branch.permutation.branch, branch.permutation.desc);
        match maker.make(branch) {
            // The publisher left with an error of its own.
            Ok(()) if finished.send(branch).is_err() => break,
            Ok(()) => {}
            Err(failure) => {
                failed += 1;
                tell(branch, &failure);
            }
        }
    }
    Ok(failed)
}

fn publish_all(
    finished: &Mutex<Receiver<&PlannedBranch>>,
    shared: &Shared<'_>,
) -> Result<usize, Failure> {
    let repository = Repository::open(shared.repository)?;
    let next = || finished.lock().ok().and_then(|queue| queue.recv().ok());
    let mut failed = 0;
    while let Some(branch) = next() {
        if let Err(failure) = publish(&repository, branch) {
            failed += 1;
            tell(branch, &failure);
        }
    }
    Ok(failed)
}

fn tell(branch: &PlannedBranch, failure: &Failure) {
    eprintln!("{}: failed: {}", branch.permutation.branch, failure.text);
    if let Some(hint) = &failure.hint {
        eprintln!("hint: {hint}");
    }
}

/// Branches with the same tokens are quantized in one pass each, then scored one by one.
pub fn make_together(
    missing: &[&PlannedBranch],
    shared: &Shared<'_>,
    devices: &[Device],
) -> Result<usize, Failure> {
    let [device] = devices else {
        let text = "--shared-hessian makes all branches on one device";
        return Err(Failure::with_hint(text, "name one with --device"));
    };
    let maker = Maker::new(shared, *device);
    let mut passes: Vec<(String, Vec<&PlannedBranch>)> = Vec::new();
    let solved = |branch: &&PlannedBranch| branch.permutation.spec.method == Method::Gptq;
    for branch in missing.iter().copied().filter(solved) {
        let key = Shared::key(&branch.permutation);
        match passes.iter_mut().find(|(found, _)| *found == key) {
            Some((_, branches)) => branches.push(branch),
            None => passes.push((key, vec![branch])),
        }
    }
    for (_, branches) in &passes {
        maker.quantize_together(branches)?;
    }
    make_all(missing, shared, devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_and_small_take_turns() {
        let order = |sizes: &[u64]| large_and_small(sizes, |size| size);
        assert_eq!(order(&[4, 7, 3, 8, 5, 6]), [8, 5, 7, 4, 6, 3]);
        assert_eq!(order(&[1, 2, 3]), [3, 1, 2]);
        assert_eq!(order(&[1]), [1]);
        assert!(order(&[]).is_empty());
    }
}
