//! All branches that are missing, on all devices.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use gptq_model::{Device, DeviceContext};
use gptq_repository::Repository;
use gptq_types::{Method, PlannedBranch};

use super::branch::{Maker, Shared, publish, remove};
use super::lock::{Asked, Lock};
use super::state::State;
use crate::failure::Failure;

/// Threads that publish, and branches that may wait for them. A branch of several GB takes seconds
/// to hash, on one thread since sha256 is a chain; with a shared Hessian all are finished at once.
const PUBLISHERS: usize = 6;
const WAITING: usize = 1;

/// A branch that this process alone works on.
type Task<'a> = (&'a PlannedBranch, Lock);

/// Branches still to be made. Those that another process is making come last, in case it fails.
struct Queue<'a> {
    repository: &'a Path,
    taken: Vec<Task<'a>>,
    open: VecDeque<&'a PlannedBranch>,
    held: VecDeque<&'a PlannedBranch>,
}

impl<'a> Queue<'a> {
    fn new(missing: &[&'a PlannedBranch], taken: Vec<Task<'a>>, repository: &'a Path) -> Self {
        Queue {
            repository,
            taken,
            open: large_and_small(missing, |branch| branch.weight_bytes).into(),
            held: VecDeque::new(),
        }
    }

    /// The next one that is free.
    fn free(&mut self) -> Result<Option<Task<'a>>, Failure> {
        if let Some(task) = self.taken.pop() {
            return Ok(Some(task));
        }
        while let Some(branch) = self.open.pop_front() {
            let name = &branch.permutation.branch;
            match Lock::ask(self.repository, name)? {
                Asked::Taken(lock) => return Ok(Some((branch, lock))),
                Asked::Held(why) => {
                    eprintln!("{name}: {why}, which is waited for");
                    self.held.push_back(branch);
                }
            }
        }
        Ok(None)
    }
}

/// Removes what a process left that was killed after it had made a branch; one that still works on it
/// holds its lock.
pub fn tidy(branches: &[&PlannedBranch], repository: &Repository) -> Result<(), Failure> {
    for name in branches.iter().map(|branch| &branch.permutation.branch) {
        let work = State::work(repository.path(), name);
        if work.exists()
            && repository.has(name)
            && let Asked::Taken(_lock) = Lock::ask(repository.path(), name)?
            && work.exists()
        {
            remove(&work)?;
        }
    }
    Ok(())
}

/// The next branch that is absent and free, or becomes free; one that another process made
/// meanwhile is left out.
fn next<'a>(
    queue: &Mutex<Queue<'a>>,
    repository: &Repository,
) -> Result<Option<Task<'a>>, Failure> {
    let poisoned = || Failure::new("a worker of the matrix ended in a panic");
    loop {
        let (free, held) = {
            let mut queue = queue.lock().map_err(|_| poisoned())?;
            match queue.free()? {
                Some(task) => (Some(task), None),
                None => (None, queue.held.pop_front()),
            }
        };
        let task = match (free, held) {
            (Some(task), _) => task,
            (None, Some(branch)) => {
                let lock = Lock::wait(repository.path(), &branch.permutation.branch)?;
                (branch, lock)
            }
            (None, None) => return Ok(None),
        };
        if !repository.has(&task.0.permutation.branch) {
            return Ok(Some(task));
        }
    }
}

/// Makes branches on all devices while other threads hash and commit the finished ones. Failed branches are
/// reported and skipped; returns how many failed. `taken` are branches whose locks are already held.
pub fn make_all<'a>(
    missing: &[&'a PlannedBranch],
    taken: Vec<Task<'a>>,
    shared: &'a Shared<'a>,
    devices: &[Device],
) -> Result<usize, Failure> {
    let all = missing.len() + taken.len();
    let queue = Mutex::new(Queue::new(missing, taken, shared.repository));
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WAITING);
        let receiver = Arc::new(Mutex::new(receiver));
        let publishers: Vec<_> = (0..PUBLISHERS.min(all))
            .map(|_| {
                let receiver = receiver.clone();
                scope.spawn(move || publish_all(&receiver, shared))
            })
            .collect();
        drop(receiver); // publishers that all left with an error must not keep a device waiting
        let workers: Vec<_> = (devices.iter())
            .map(|&device| {
                let (queue, sender) = (&queue, sender.clone());
                scope.spawn(move || work(device, shared, queue, &sender))
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
    queue: &Mutex<Queue<'a>>,
    finished: &SyncSender<Task<'a>>,
) -> Result<usize, Failure> {
    let repository = Repository::open(shared.repository)?;
    let mut maker = Maker::new(shared, DeviceContext::open(device)?);
    let mut failed = 0;
    while let Some((branch, lock)) = next(queue, &repository)? {
        eprintln!("{}: {}", branch.permutation.branch, branch.permutation.desc);
        match maker.make(branch) {
            // The publisher left with an error of its own.
            Ok(()) if finished.send((branch, lock)).is_err() => break,
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
    finished: &Mutex<Receiver<Task<'_>>>,
    shared: &Shared<'_>,
) -> Result<usize, Failure> {
    let repository = Repository::open(shared.repository)?;
    let next = || finished.lock().ok().and_then(|queue| queue.recv().ok());
    let mut failed = 0;
    while let Some((branch, _lock)) = next() {
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

/// Branches with the same tokens are quantized in one pass each, then scored one by one. Those that
/// another process is making are waited for: a branch is the same in whatever company it is made.
pub fn make_together<'a>(
    missing: &[&'a PlannedBranch],
    shared: &'a Shared<'a>,
    devices: &[Device],
) -> Result<usize, Failure> {
    let [device] = devices else {
        let text = "--shared-hessian makes all branches on one device";
        return Err(Failure::with_hint(text, "name one with --device"));
    };
    let repository = Repository::open(shared.repository)?;
    let queue = Mutex::new(Queue::new(missing, Vec::new(), shared.repository));
    let mut free = Vec::new();
    while let Some(task) = (queue.lock().ok()).map_or(Ok(None), |mut queue| queue.free())? {
        if !repository.has(&task.0.permutation.branch) {
            free.push(task);
        }
    }
    let mut failed = pass_together(free, shared, *device)?;
    let mut left = Vec::new();
    while let Some(task) = next(&queue, &repository)? {
        left.push(task);
    }
    failed += pass_together(left, shared, *device)?;
    Ok(failed)
}

fn pass_together<'a>(
    tasks: Vec<Task<'a>>,
    shared: &'a Shared<'a>,
    device: Device,
) -> Result<usize, Failure> {
    if tasks.is_empty() {
        return Ok(0);
    }
    let maker = Maker::new(shared, DeviceContext::open(device)?);
    let mut passes: Vec<(String, Vec<&PlannedBranch>)> = Vec::new();
    let solved = |branch: &&PlannedBranch| branch.permutation.spec.method == Method::Gptq;
    for branch in tasks.iter().map(|&(branch, _)| branch).filter(solved) {
        let key = Shared::key(&branch.permutation);
        match passes.iter_mut().find(|(found, _)| *found == key) {
            Some((_, branches)) => branches.push(branch),
            None => passes.push((key, vec![branch])),
        }
    }
    for (_, branches) in &passes {
        maker.quantize_together(branches)?;
    }
    make_all(&[], tasks, shared, &[device])
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
